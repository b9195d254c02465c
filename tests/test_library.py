"""Loading and saving models, and training from Python on arrays of tokens."""

import jax
import numpy as np
import pytest

import fsdfm_jax as fs

TEXT_NL = np.tile(np.arange(8), (16, 2))
NETWORK = {"width": 16, "num_blocks": 1, "num_heads": 2, "cond_width": 8, "dropout": 0.0}
HOW = {"num_steps": 3, "batch_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base():
    return fs.train(TEXT_NL, model=NETWORK, **HOW)


def _equal(one, other):
    same = jax.tree.map(np.array_equal, one.params(), other.params())
    return all(jax.tree.leaves(same))


def test_training_is_a_function_of_its_arguments(base):
    assert base.model.vocab_size == 8
    assert base.block_length == 16
    assert base.provenance["step"] == 3
    assert _equal(base, fs.train(TEXT_NL, model=NETWORK, **HOW))
    assert not _equal(base, fs.train(TEXT_NL, model=NETWORK, **HOW, seed=1))


def test_a_few_step_stage_starts_from_its_base(base, tmp_path):
    # At a learning rate of next to nothing the base is what comes out, and its conditioning is new.
    how = HOW | {"learning_rate": 1e-12}
    student = fs.train(TEXT_NL, stage="distill", base=base, **how, ema_decay=0.0)
    assert student.model.conditioning == "additive"
    np.testing.assert_allclose(
        student.params()["head"]["kernel"], base.params()["head"]["kernel"], atol=1e-6
    )
    fs.save(student, tmp_path / "student.safetensors")
    assert _equal(student, fs.load(tmp_path / "student.safetensors"))


@pytest.mark.slow
def test_learned_positions_are_those_of_the_block(tmp_path):
    base = fs.train(TEXT_NL, model=NETWORK | {"positions": "learned"}, **HOW)
    assert base.model.num_positions == 16
    student = fs.train(TEXT_NL[:, :12], stage="distill", base=base, **HOW)
    assert student.model.num_positions == 16
    with pytest.raises(ValueError, match="16 learned positions, got a block of 17"):
        fs.train(np.tile(TEXT_NL, 2)[:, :17], stage="distill", base=base, **HOW)


@pytest.fixture(scope="module")
def student(base):
    return fs.train(TEXT_NL, stage="step_aware", base=base, **HOW)


@pytest.mark.slow
def test_refine_matches_its_base_or_the_model_that_it_is_given(base, student):
    how = HOW | {"stage": "refine", "max_log2_steps": 1, "ema_decay": 0.0}
    refined = fs.train(TEXT_NL, base=base, **how)
    assert refined.model.conditioning == "additive"
    assert _equal(refined, fs.train(TEXT_NL, base=base, teacher=base, **how))
    assert not _equal(fs.train(TEXT_NL, base=student, teacher=base, **how), student)


@pytest.mark.parametrize("what", ["none", "few-step", "other network", "other path"])
def test_refine_refuses_what_is_no_base_model_of_its_own(base, student, what):
    how = HOW | {"stage": "refine", "max_log2_steps": 1}
    if what == "none":
        given, message = {}, "teacher must be a base model.*give it as teacher="
    elif what == "few-step":
        given, message = {"teacher": student}, "teacher must be a base model"
    else:
        network, path = (
            (NETWORK | {"width": 8}, {}) if "network" in what else (NETWORK, {"power": 2.0})
        )
        given = {"teacher": fs.train(TEXT_NL, model=network, path=path, **HOW | {"num_steps": 1})}
        message = "teacher must have the same network and path as base"
    with pytest.raises(ValueError, match=message):
        fs.train(TEXT_NL, base=student, **how, **given)


def test_guidance_needs_a_weaker_model(base):
    how = HOW | {"stage": "distill", "guidance": 1.0}
    with pytest.raises(ValueError, match="guide must be a base model"):
        fs.train(TEXT_NL, base=base, guide="short", **how)
    weak = fs.train(TEXT_NL, model=NETWORK, **HOW | {"num_steps": 1})
    assert (
        fs.train(TEXT_NL, base=base, guide=weak, **how).provenance["config"]["distill"]["guidance"]
        == 1
    )


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (TEXT_NL[0], {}, r"integer ids \[N, L\]"),
        (TEXT_NL.astype(np.float32), {}, r"integer ids \[N, L\]"),
        (TEXT_NL - 1, {}, "must be non-negative"),
        (TEXT_NL, {"vocab_size": 7}, "vocab_size=7"),
        (TEXT_NL, {"stage": "distil"}, "expected one of autoregressive"),
        (TEXT_NL, {"stage": "refine"}, "give it as base="),
        (TEXT_NL, {"init_from": "pretrain"}, "give a model as base="),
        (TEXT_NL, {"batch_size": 0}, "batch_size must be"),
        (TEXT_NL, {"accumulate": 3}, "multiple of accumulate=3"),
        (TEXT_NL, {"warmup": 3}, "pretrain.warmup_steps"),
    ],
)
def test_bad_arguments_say_what_to_do(text, changes, message):
    with pytest.raises(ValueError, match=message):
        fs.train(text, **({"model": NETWORK} | HOW | changes))


def test_a_base_brings_its_own_network(base):
    with pytest.raises(ValueError, match="omit these"):
        fs.train(TEXT_NL, stage="distill", base=base, model=NETWORK, **HOW)


def test_texts_need_a_tokenizer(base):
    with pytest.raises(ValueError, match="no tokenizer"):
        fs.generate(base)
