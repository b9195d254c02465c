"""Working directories: pipelines, recipes, weights, the stored configuration."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import base
from fsdfm_jax import stages
from fsdfm_jax.convert import run_folder
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import checkpoint
from fsdfm_jax.training import pipeline as pipeline_lib
from fsdfm_jax.training import recipe as recipe_lib
from fsdfm_jax.training import workdir as workdir_lib
from fsdfm_jax.training.pipeline import Entry

PATH = base.get_config().path.to_dict()
MODEL = ModelConfig(vocab_size=5, width=4, num_blocks=1, num_heads=1, cond_width=4)


def _config(pipeline="pretrain", **changes):
    config = base.get_config()
    config.pipeline = pipeline
    config.update_from_flattened_dict(changes)
    return config


def _save(directory, *, config=None, stage="pretrain", recipe=None, steps=(1,), tokenizer="tok"):
    """Checkpoints of a run whose weights are its step, their average the step / 2."""
    config = (config or _config()).to_dict()
    metadata = recipe_lib.make_metadata(
        config, MODEL, recipe or {}, run=stage, stage=stage, tokenizer=tokenizer, data="data"
    )
    with checkpoint.Checkpoints(
        directory / "checkpoints", retention=checkpoint.Retention(keep=9)
    ) as checkpoints:
        for step in steps:
            state = {"params": {"w": jnp.full(2, float(step))}, "ema": {"w": jnp.full(2, step / 2)}}
            checkpoints.save(step, state, metadata)


# ---------------------------------------------------------------------------------------- pipelines
def test_entries_start_from_the_stage_before(tmp_path):
    config = _config(" autoregressive, pretrain,step_aware,,distill , refine")
    stage = tmp_path / "stages"
    assert pipeline_lib.entries(config, tmp_path) == [
        Entry("autoregressive", "autoregressive", None),
        Entry("pretrain", "pretrain", None),
        Entry("step_aware", "step_aware", stage / "pretrain"),
        Entry("distill", "distill", stage / "step_aware"),
        Entry("refine", "refine", stage / "distill"),
    ]


def test_repeated_stages_are_further_rounds(tmp_path):
    config = _config("pretrain,refine,refine,autoregressive,refine")
    found = pipeline_lib.entries(config, tmp_path)
    assert [entry.run for entry in found] == [
        "pretrain",
        "refine",
        "refine_2",
        "autoregressive",
        "refine_3",
    ]
    bases = [entry.base and entry.base.name for entry in found]
    assert bases == [None, "pretrain", "refine", None, "refine_2"]
    assert found[4].stage == "refine"


@pytest.mark.parametrize("pipeline", ["", " , ", ","])
def test_empty_pipeline(tmp_path, pipeline):
    with pytest.raises(ValueError, match="pipeline is empty.*pretrain"):
        pipeline_lib.entries(_config(pipeline), tmp_path)


def test_unknown_stage_is_named_with_the_known(tmp_path):
    with pytest.raises(ValueError, match=f"'distll'; expected {', '.join(stages.NAMES)}"):
        pipeline_lib.entries(_config("pretrain,distll"), tmp_path)


@pytest.mark.parametrize("first", ["distill", "autoregressive,refine", "step_aware,pretrain"])
def test_few_steps_need_base_weights(tmp_path, first):
    name = first.split(",")[-1] if first.startswith("auto") else first.split(",")[0]
    with pytest.raises(ValueError, match=rf"put 'pretrain' first, or set {name}\.init_from"):
        pipeline_lib.entries(_config(first), tmp_path)


def test_init_from_by_name_and_by_path(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    # A stage that stands earlier in the pipeline needs no checkpoint yet.
    config = _config("pretrain,step_aware,distill", **{"distill.init_from": "pretrain"})
    assert pipeline_lib.entries(config, here)[2].base == here / "stages" / "pretrain"
    # A run that was trained here before, but isn't in the pipeline.
    _save(here / "stages" / "old")
    config = _config("distill", **{"distill.init_from": "old"})
    assert pipeline_lib.entries(config, here)[0].base == here / "stages" / "old"
    # A run of another working directory.
    _save(there / "stages" / "pretrain")
    path = str(there / "stages" / "pretrain")
    config = _config("pretrain,distill", **{"distill.init_from": path})
    assert pipeline_lib.entries(config, here)[1].base == there / "stages" / "pretrain"
    # Further training of a base model.
    config = _config("pretrain", **{"pretrain.init_from": path})
    assert pipeline_lib.entries(config, here)[0].base == there / "stages" / "pretrain"


@pytest.mark.parametrize("given", ["pretrain", "no/such/stages/pretrain", "distill"])
def test_init_from_untrained(tmp_path, given):
    config = _config("distill", **{"distill.init_from": given})
    with pytest.raises(ValueError, match=f"distill.init_from='{given}' is not a trained run"):
        pipeline_lib.entries(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_directories(tmp_path):
    config = _config()
    assert pipeline_lib.data_directory(tmp_path, config) == tmp_path / "data"
    config.data.directory = "elsewhere"
    assert str(pipeline_lib.data_directory(tmp_path, config)) == "elsewhere"
    assert workdir_lib.stage_directory(tmp_path, "refine_2") == tmp_path / "stages" / "refine_2"


# -------------------------------------------------------------------------------- further runs
def _needed(config, workdir):
    """Folders of what the last stage of a pipeline needs."""
    *earlier, entry = pipeline_lib.entries(config, workdir)
    stage = stages.make_stage(entry.stage, config, pipeline_lib.make_process(config, 5))
    return pipeline_lib.needed_runs(stage, entry, workdir, earlier)


def test_a_guided_stage_needs_its_base_and_the_run_that_it_names(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    assert _needed(_config("pretrain,distill"), here) == {}
    guided = {"distill.guidance": 1.0}
    config = _config("pretrain,pretrain,distill", **guided, **{"distill.guide": "pretrain"})
    runs = here / "stages"
    assert _needed(config, here) == {
        "init_from": runs / "pretrain_2",
        "guide": runs / "pretrain",
    }
    _save(there)
    config = _config("pretrain,distill", **guided, **{"distill.guide": str(there)})
    assert _needed(config, here) == {"init_from": runs / "pretrain", "guide": there}
    config = _config("pretrain,distill", **guided, **{"distill.guide": "short"})
    with pytest.raises(ValueError, match="distill.guide='short' is not a trained run"):
        _needed(config, here)


@pytest.mark.parametrize(
    ("pipeline", "teacher", "run"),
    [
        ("pretrain,distill,refine", "pretrain", "pretrain"),
        ("pretrain,distill,refine,refine", "pretrain", "pretrain"),  # in later rounds as well
        ("pretrain,pretrain,refine", "base", "pretrain_2"),
        ("pretrain,pretrain,refine", "pretrain", "pretrain"),
    ],
)
def test_refine_needs_the_base_model_that_it_names(tmp_path, pipeline, teacher, run):
    config = _config(pipeline, **{"refine.teacher": teacher})
    assert _needed(config, tmp_path) == {"teacher": tmp_path / "stages" / run}


def test_the_recipe_says_how_what_is_needed_was_trained():
    plain = _recipe()
    assert plain["needs"] == []
    one, two = (_recipe(needs=[{"seed": seed}]) for seed in (1, 2))
    assert plain["needs"] != one["needs"] != two["needs"]
    assert one == _recipe(needs=[{"seed": 1}])
    # What they are called doesn't matter.
    recipes = [
        recipe_lib.make_recipe(_config(**{"refine.teacher": name}).to_dict(), "refine", None)
        for name in ("pretrain", "elsewhere")
    ]
    assert recipes[0] == recipes[1]
    assert "noise" in recipes[0]["refine"]


# ------------------------------------------------------------------------------------------ recipes
def _recipe(base_recipe=None, needs=(), **changes):
    changes = {"pipeline": "pretrain,distill"} | changes
    return recipe_lib.make_recipe(_config(**changes).to_dict(), "distill", base_recipe, needs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of `distill` whose base has the recipe {"seed": 0}."""
    directory = tmp_path_factory.mktemp("trained") / "stages" / "distill"
    _save(directory, stage="distill", recipe=_recipe({"seed": 0}))
    return directory


def test_recipes_are_json():
    recipe = _recipe({"seed": 0})
    assert json.loads(json.dumps(recipe)) == recipe


@pytest.mark.parametrize(("key", "value"), [("positions", "learned"), ("given", "marked")])
def test_recipes_from_before_a_key_are_those_of_its_default(key, value):
    assert key not in _recipe()["model"]
    assert _recipe(**{f"model.{key}": value})["model"][key] == value


def test_the_same_recipe_goes_on(trained, tmp_path):
    recipe_lib.check_recipe(trained, _recipe({"seed": 0}))
    recipe_lib.check_recipe(tmp_path, _recipe())  # nothing trained here
    assert workdir_lib.saved_metadata(trained)["recipe"] == _recipe({"seed": 0})


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("seed", 0, 3),
        ("data.corpus", "'sotu'", "texts/*.txt"),
        ("data.block_length", 128, 64),
        ("path.power", 1.0, 2.0),
        ("model.width", 128, 64),
        ("model.dropout", 0.1, 0.0),
        ("optim.clip_norm", 1.0, 2.0),
        ("distill.num_steps", 1000, 10),
        ("distill.batch_size", 96, 8),
        ("distill.teacher_rule", "'heun'", "rk4"),
    ],
)
def test_a_changed_key_is_refused_by_name(trained, key, old, new):
    with pytest.raises(ValueError, match=re.escape(f"({key}: {old} before, {new!r} now)")):
        recipe_lib.check_recipe(trained, _recipe({"seed": 0}, **{key: new}))


def test_a_run_of_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recipe_lib, "FORMAT", 2)
        patch.setattr(recipe_lib, "code_version", lambda: "0.1+abc")
        _save(tmp_path / "stages" / "distill", stage="distill", recipe=_recipe())
    run = tmp_path / "stages" / "distill"
    with pytest.raises(ValueError, match=r"another version of this code \(0\.1\+abc\): finish it"):
        recipe_lib.check_recipe(run, _recipe())
    assert workdir_lib.load_weights(run).step == 1  # weights are weights
    # Its configuration stands alone in config.json.
    (tmp_path / "config.json").write_text(json.dumps(_config().to_dict()))
    with pytest.raises(ValueError, match=r"another version of this code \(0\.1\+abc\): finish it"):
        pipeline_lib.load_config(tmp_path)


def test_all_changed_keys_are_named(trained):
    with pytest.raises(ValueError, match=r"base: .*; model.width: .*; seed: "):
        recipe_lib.check_recipe(trained, _recipe({"seed": 3}, **{"seed": 3, "model.width": 64}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval.num_samples", 3),
        ("eval.steps", (1,)),
        ("train.log_every", 3),
        ("train.checkpoint_every", 3),
        ("mesh.data", 8),
        ("data.directory", "elsewhere"),
        ("pipeline", "distill"),
        ("distill.init_from", "elsewhere"),
        ("distill.guide", "elsewhere"),
        ("refine.teacher", "elsewhere"),
        ("refine.noise", (0.1, 0.2)),
        ("optim.max_skipped", 3),
        ("model.remat", "full"),
    ],
)
def test_keys_that_leave_the_weights_alone(trained, key, value):
    recipe_lib.check_recipe(trained, _recipe({"seed": 0}, **{key: value}))


LENGTHS = {"distill.num_steps": 20, "distill.decay_steps": 5}


@pytest.mark.parametrize(
    ("step", "changes", "refused"),
    [
        (15, {}, ""),
        (15, {"distill.num_steps": 30}, ""),
        (15, {"distill.num_steps": 18, "distill.decay_steps": 3}, ""),
        (15, {"distill.decay_steps": 6}, "decay_steps"),  # would have begun before
        (15, {"distill.num_steps": 19}, "num_steps"),
        (15, {"distill.decay_steps": 0}, "decay_steps"),  # a cosine
        (15, {"distill.num_steps": 30, "distill.learning_rate": 1e-3}, "learning_rate"),
        (16, {"distill.num_steps": 30}, "num_steps"),  # has begun
    ],
)
def test_the_length_is_free_while_the_learning_rate_is_constant(tmp_path, step, changes, refused):
    _save(tmp_path, stage="distill", recipe=_recipe(**LENGTHS), steps=(step,))
    if not refused:
        recipe_lib.check_recipe(tmp_path, _recipe(**LENGTHS | changes))
        return
    with pytest.raises(ValueError, match=rf"\(distill.{refused}: [^;]*\)"):
        recipe_lib.check_recipe(tmp_path, _recipe(**LENGTHS | changes))


def test_a_mixture_goes_on_wherever_its_folders_are():
    mixture = lambda text, **more: _recipe(**{"data.mixture": text}, **more)
    first = mixture("/here/a=0.9,/here/b=0.1")
    assert mixture("~/there/x=0.90,~/there/y=0.1", **{"data.corpus": "without effect"}) == first
    assert mixture("/here/a=0.8,/here/b=0.2") != first


def test_the_recipe_of_the_base_matters(trained):
    for other in (None, {"seed": 1}):
        with pytest.raises(ValueError, match=r"\(base: "):
            recipe_lib.check_recipe(trained, _recipe(other))


def test_digest():
    assert recipe_lib.digest({"a": 1, "b": (2, 3)}) == recipe_lib.digest({"b": [2, 3], "a": 1})
    assert recipe_lib.digest({"a": 1}) != recipe_lib.digest({"a": 2})
    assert recipe_lib.digest({"a": 1}) != recipe_lib.digest({"a": {"": 1}})


# ------------------------------------------------------------------------------------------ weights
def test_weights_of_the_newest_checkpoint(tmp_path):
    """The average if the stage has one, else the weights."""
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    _save(kept, config=_config(**{"pretrain.ema_decay": 0.9}), steps=(2, 4, 6))
    _save(plain, config=_config(**{"pretrain.ema_decay": 0.0}), steps=(2, 4, 6))
    for directory, expected in ((kept, 3.0), (plain, 6.0)):
        weights = workdir_lib.load_weights(directory, tokenizer="tok")
        np.testing.assert_array_equal(weights.params["w"], np.full(2, expected))
        assert weights.step == 6
        assert weights.model == MODEL
        assert weights.metadata["run"] == "pretrain"
    assert isinstance(jax.tree.leaves(weights.params)[0], jax.Array)


@pytest.mark.parametrize("folder", ["stages/none", "empty"])
def test_no_weights(tmp_path, folder):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"no checkpoint in .*{folder}.*train that run first"):
        workdir_lib.load_weights(tmp_path / folder)
    assert not (tmp_path / "stages").exists()


def test_weights_of_a_damaged_checkpoint_are_refused(tmp_path):
    """Only training falls back to the previous checkpoint; reading weights must not."""
    _save(tmp_path, steps=(2, 4))
    path = tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="step 4 in .* is damaged"):
        workdir_lib.load_weights(tmp_path)
    with pytest.raises(checkpoint.DamagedCheckpoint, match="step 4 in .* is damaged"):
        run_folder.read(tmp_path, which="ema")
    assert workdir_lib.saved_metadata(tmp_path) is not None  # of step 2: a run resumes from there


def test_weights_of_another_tokenizer(trained):
    with pytest.raises(ValueError, match="tokenizer tok, but the data has other"):
        workdir_lib.load_weights(trained, tokenizer="other")
    assert workdir_lib.load_weights(trained).metadata["tokenizer"] == "tok"


# ------------------------------------------------------------------------------------ configuration
def test_config_round_trip(tmp_path):
    config = _config("pretrain,refine", **{"eval.steps": (1, 3), "model.width": 64})
    pipeline_lib.save_config(tmp_path / "new" / "run", config)
    loaded = pipeline_lib.load_config(tmp_path / "new" / "run")
    assert isinstance(loaded, ml_collections.ConfigDict)
    # JSON has no tuples; nothing else changes.
    assert json.dumps(loaded.to_dict(), sort_keys=True) == json.dumps(
        config.to_dict(), sort_keys=True
    )
    assert loaded.model.width == 64
    assert pipeline_lib.entries(loaded, tmp_path) == pipeline_lib.entries(config, tmp_path)
    assert recipe_lib.digest(loaded.to_dict()) == recipe_lib.digest(config.to_dict())


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="not a working directory.*fsdfm_jax.main"):
        pipeline_lib.load_config(tmp_path)


def test_bases_of_another_network_or_process_are_refused(trained, tmp_path):
    """Neither the number of heads nor the schedule is visible in the shapes of weights."""
    recipe_lib.check_base(tmp_path / "nothing there yet", MODEL, PATH)
    recipe_lib.check_base(trained, MODEL, PATH)
    few_step = dataclasses.replace(MODEL, conditioning="additive", dropout=0.5, remat="full")
    recipe_lib.check_base(trained, few_step, PATH)
    two_heads = dataclasses.replace(MODEL, num_heads=2)
    with pytest.raises(ValueError, match=r"model\.num_heads: 1 there, 2 here"):
        recipe_lib.check_base(trained, two_heads, PATH)
    learned = dataclasses.replace(MODEL, positions="learned", num_positions=8)
    with pytest.raises(ValueError, match=r"model\.positions: 'rotary' there, 'learned' here"):
        recipe_lib.check_base(trained, learned, PATH)
    with pytest.raises(ValueError, match=r"path\.power: 1\.0 there, 2\.0 here"):
        recipe_lib.check_base(trained, MODEL, PATH | {"power": 2.0})


def test_weight_shapes_are_those_of_the_network(trained):
    shapes = workdir_lib.weight_shapes(trained)
    assert shapes["vocab_embed"]["embedding"].shape == (5, 4)
    assert isinstance(shapes["vocab_embed"]["embedding"], jax.ShapeDtypeStruct)
