"""Ahead-of-time compilation: the figures read from a compiled program, and the command."""

import csv
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import base, tiny
from fsdfm_jax import stages
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.model import ModelConfig
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.stages import few_step
from launch import aot, aot_compile, flops

ROOT = pathlib.Path(__file__).parents[1]
LOCAL = aot.find_target("local")


# -------------------------------------------------------------------------------------- operations


def test_operations_of_a_forward_pass_are_those_of_its_program():
    # One block, so that the loop over blocks hides nothing from the compiler's own count. Attention
    # in one piece has no loop either; the rest of the program (norms, softmax) is not counted.
    model = ModelConfig(256, 64, 1, 2, 4, attention="manual")
    batch, length = 2, 128
    params = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    arguments = (params, jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch,)))
    run = jax.jit(lambda p, x, t: model_lib.apply(p, model, x, t))
    counted = run.lower(*arguments).compile().cost_analysis()["flops"]
    ours = flops.forward_flops(model, batch, length)
    assert ours <= counted <= 1.1 * ours


def test_operations_of_a_step_count_student_and_teacher():
    config = base.get_config()
    base.use_paper_values(config, "0.17B")
    base.use_paper_recipe(config)
    process = process_lib.make_process(**config.path, num_tokens=50_257, eos_id=0)
    model = stages.make_stage("distill", config, process).model
    forward = flops.forward_flops(model, 1, 1024)
    dense = 12 * (4 + 8) * 768**2 + 768 * 50_257
    assert forward == 2 * 1024 * (dense + 2 * 12 * 1024 * 768)
    assert flops.step_flops("pretrain", config, model, 96) == 3 * 96 * forward
    assert flops.step_flops("step_aware", config, model, 96) == 3 * 96 * forward
    config.distill.tau = 2.0**-7  # fewer rows for the teacher than for the data
    taught = 96 - round(96 * few_step.split_budgets(config.distill, "distill")[0].share)
    assert 0 < taught < 48
    assert flops.step_flops("distill", config, model, 96) == (3 * 96 + 4 * taught) * forward
    config.distill.accumulate = 48  # parts of two rows, one of each kind
    assert flops.step_flops("distill", config, model, 96) == (3 * 96 + 4 * 48) * forward
    config.distill.accumulate = 1
    config.distill.teacher_rule = "heun"
    assert flops.step_flops("distill", config, model, 96) == (3 * 96 + 2 * taught) * forward
    config.distill.guidance = 1.0
    guided = 3 * 96 + 2 * taught + 2 * (96 - taught)
    assert flops.step_flops("distill", config, model, 96) == guided * forward
    # The student: a walk, a training pass, two readers. Three turns: a walk, its answers, a pass.
    config.refine.auxiliary_updates = 3
    turns = (1 + 3 + 2) + 3 * (1 + 1 + 3)
    assert flops.step_flops("refine", config, model, 96) == 96 * turns * forward


# ------------------------------------------------------------------------------------- collectives


def on_mesh(shape=(8,), names=("d",)):
    return jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("inside", [True, False])
def test_a_sum_counts_once_in_a_loop_and_outside(inside):
    def products(x_BD, w_SDD):
        def step(total_DD, w_DD):
            product_DD = x_BD.T @ jnp.tanh(x_BD @ w_DD)
            return total_DD + (jax.lax.psum(product_DD, "d") if inside else product_DD), None

        total_DD, _ = jax.lax.scan(step, jnp.zeros(w_SDD.shape[1:]), w_SDD)
        return total_DD if inside else jax.lax.psum(total_DD, "d")

    spread = jax.shard_map(
        products, mesh=on_mesh(), in_specs=(P("d"), P()), out_specs=P(), check_vma=False
    )
    compiled = jax.jit(spread).lower(jnp.zeros((32, 48)), jnp.zeros((6, 48, 48))).compile()
    assert aot.collectives(compiled.as_text()) == {"all-reduce": (1, 48 * 48 * 4)}


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("all-gather", P(None, "a"), P()),
        ("all-gather", P(("a", "b"), None), P("b", None)),
        ("all-to-all", P("a", None), P(None, "a")),
    ],
)
def test_exchanges_count_by_kind(kind, before, after):
    mesh = on_mesh((4, 2), ("a", "b"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.bfloat16, sharding=NamedSharding(mesh, before))
    move = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, after))
    found = aot.collectives(jax.jit(move).lower(x).compile().as_text())
    number, num_bytes = found.pop(kind)
    assert number == 1
    assert num_bytes > 0
    assert set(found) <= {"collective-permute"}


def test_a_scatter_counts_as_the_whole_array():
    scatter = lambda x: jax.lax.psum_scatter(x, "d", scatter_dimension=0, tiled=True)
    spread = jax.shard_map(scatter, mesh=on_mesh(), in_specs=P(None, "d"), out_specs=P("d"))
    text = jax.jit(spread).lower(jnp.zeros((16, 64))).compile().as_text()
    assert aot.collectives(text) == {"reduce-scatter": (1, 16 * 8 * 4)}


TPU = """HloModule toy, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (input.1: bf16[8,64]) -> bf16[1,64] {
  %input.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-reduce.2 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%input.1), to_apply=%add
}

%start (p.0: f32[2,64]) -> f32[16,64] {
  %p.0 = f32[2,64]{1,0:T(8,128)S(1)} parameter(0)
  %all-gather.1 = f32[16,64]{1,0:T(8,128)} all-gather(%p.0), frontend_attributes={chain_id="3"}
}

%end (p.1: f32[2,64]) -> f32[16,64] {
  %p.1 = f32[2,64]{1,0:T(8,128)S(1)} parameter(0)
  %all-gather.2 = f32[16,64]{1,0:T(8,128)} all-gather(%p.1), frontend_attributes={chain_id="3"}
}

ENTRY %main (x.0: f32[2,64]) -> f32[2,64] {
  %x.0 = f32[2,64]{1,0:T(8,128)} parameter(0)
  %ag = (f32[2,64]{1,0:T(8,128)}, f32[16,64]{1,0:T(8,128)}) all-gather-start(%x.0), dimensions={0}
  %ag.1 = f32[16,64]{1,0:T(8,128)} all-gather-done(%ag)
  %s = (f32[2,64]{1,0}, f32[2,64]{1,0}, u32[]{:S(2)}) collective-permute-start(%x.0)
  ROOT %s.1 = f32[2,64]{1,0:T(8,128)} collective-permute-done(%s)
}
"""


def test_collectives_of_a_tpu_count_once_over_their_kernels():
    assert aot.collectives(TPU) == {
        "all-gather": (2, 2 * 16 * 64 * 4),
        "collective-permute": (1, 2 * 64 * 4),
        "reduce-scatter": (1, 8 * 64 * 2),
    }


# --------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: .. temporaries (351.88G) exceeds available HBM (15.75G).",
            351.88,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in hbm. Used 20.50G of 15.75G hbm.", 20.5),
        ("RESOURCE_EXHAUSTED: Out of memory.", None),
    ],
)
def test_a_program_too_large_is_a_row(text, needed):
    def refuse():
        raise jax.errors.JaxRuntimeError(text)

    target = aot.Target("toy", [None], 10.0, 100.0, True)
    lower = lambda rows: types.SimpleNamespace(compile=refuse)
    row = aot.describe(aot.Program("train", 1, lower, float), 8, target)
    assert row["fits"] is False
    assert row["total"] == (None if needed is None else pytest.approx(needed * 2**30))
    assert (row["rows"], row["flops"], row["least_s"]) == (8, 8.0, 0.8)
    shown = aot_compile.summary(row)
    assert f"{'?' if needed is None else f'{needed * 2**30 / 1e9:.3g}'} of 1e-07 GB" in shown


def test_other_errors_of_the_compiler_are_errors():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        aot.needed_bytes(jax.errors.JaxRuntimeError("INTERNAL: a bug"))


def toy_program(total):
    """A program that needs total(rows) bytes; more than 10,000 don't compile."""

    def lower(rows):
        if total(rows) > 10_000:
            error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
            return types.SimpleNamespace(compile=lambda: (_ for _ in ()).throw(error))
        memory = types.SimpleNamespace(
            output_size_in_bytes=4,
            alias_size_in_bytes=4,
            argument_size_in_bytes=5,
            temp_size_in_bytes=2 * total(rows),
            generated_code_size_in_bytes=3,
            peak_memory_in_bytes=total(rows),
        )
        made = types.SimpleNamespace(
            memory_analysis=lambda: memory, cost_analysis=dict, as_text=lambda: ""
        )
        return types.SimpleNamespace(compile=lambda: made)

    return aot.Program("train", 8, lower, float), aot.Target("toy", [None], None, 1000.0, True)


def test_the_memory_of_real_devices_is_added_up():
    program, target = toy_program(lambda rows: 10 * rows)
    assert aot.describe(program, 8, target)["total"] == 80
    row = aot.describe(program, 8, target._replace(described=False))
    assert (row["total"], row["arguments"], row["temporaries"]) == (168, 5, 163)
    assert aot.describe(program, 8, target._replace(memory=None))["fits"] is None


def test_a_compiler_that_jax_cannot_read_is_named():
    program, target = toy_program(lambda rows: rows)

    def refuse():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nand a stack")

    def lower(rows):
        made = program.lower(rows).compile()
        made.as_text = refuse
        return types.SimpleNamespace(compile=lambda: made)

    message = r"fsdfm_jax\[tpu\]'. The error: INTERNAL: RET_CHECK failure$"
    with pytest.raises(ValueError, match=message):
        aot.describe(program._replace(lower=lower), 8, target)


@pytest.mark.parametrize(
    ("total", "compiled", "best"),
    [
        (lambda rows: 100 + 2 * rows, [16, 64, 448], 448),  # of 450
        (lambda rows: 100 + rows / 8, [16, 64, 1024, 7200], 7200),
        (lambda rows: 100 + 9 * rows, [16, 64, 96], 96),
        (lambda rows: 100 + 13 * rows, [16, 64], 64),  # the next is 72
        (lambda rows: 100 + 20 * rows, [16, 64, 40], 40),
        (lambda rows: 100 + rows * rows / 10, [16, 64, 120, 88], 88),
        (lambda rows: 100 + 300 * rows, [16], None),
        (lambda rows: 100 + 50 * rows, [16, 64], 16),
        (lambda rows: 100 + 20 * rows + (10_000 if rows > 60 else 0), [16, 64, 40], 40),
    ],
)
def test_the_largest_batch_is_where_a_line_meets_the_memory(total, compiled, best):
    program, target = toy_program(total)
    lines = []
    row = aot.find_largest(program, target, lines.append)
    assert [int(line.split()[0]) for line in lines] == compiled
    assert (row and row["rows"]) == best
    assert best is None or row["fits"]
    with pytest.raises(ValueError, match="needs the memory of a device, which toy doesn't"):
        aot.find_largest(program, target._replace(memory=None), lines.append)


# ---------------------------------------------------------------------------------------- programs


def small_config(**mesh):
    config = tiny.get_config("smoke")
    config.model.width = 32
    config.mesh.update(mesh)
    return config


def make(kinds, name, config, target=LOCAL, rows=16):
    return aot.make_programs(kinds, name, config, target, rows=rows, steps=3)


def test_the_programs_of_a_run_on_a_mesh():
    config = small_config(data=2, fsdp=4)
    config.optim.name = "adamw"  # two moments of each parameter; Muon's matrices have one
    mesh, (train, sample) = make(aot.KINDS, "pretrain", config)
    row = aot.describe(train, 16, LOCAL)
    process = process_lib.make_process(**config.path, num_tokens=config.data.vocab_size, eos_id=0)
    stage = stages.make_stage("pretrain", config, process)
    abstract = jax.eval_shape(lambda key: stage.init_params(key, None), jax.random.key(0))
    held = sum(leaf.device_bytes for leaf in mesh_lib.describe(mesh, abstract))
    # Parameters and two moments, spread by the rules; in addition the tokens and the key.
    assert row["arguments"] == pytest.approx(3 * held, rel=0.02)
    assert row["total"] >= row["arguments"] + row["temporaries"]
    assert row["fits"] is None
    assert row["flops"] == flops.step_flops("pretrain", config, stage.model, 16) / 8
    assert row["all-gather"] >= 2
    assert "all-gather" in aot_compile.summary(row)
    row = aot.describe(sample, 16, LOCAL)
    assert row["arguments"] == pytest.approx(held, rel=0.1)
    assert row["flops"] == 3 * flops.forward_flops(stage.model, 16, 64) / 8
    assert row["all-gather"] >= 2


@pytest.mark.parametrize("name", ["autoregressive", "step_aware", "refine"])
def test_the_other_stages_are_lowered(name):
    _, (program,) = make(["train"], name, small_config(fsdp=8))
    assert program.lower(16).as_text()
    assert program.flops(16) > 0


def test_rows_of_refine_hold_whole_samples():
    config = small_config(fsdp=8)
    config.refine.max_log2_steps, config.refine.accumulate = 2, 2  # 12 rows, on 8 devices
    _, (train, sample) = make(aot.KINDS, "refine", config, rows=48)
    assert (train.unit, sample.unit) == (48, 8)


def test_described_chips_have_the_attention_of_their_kind(monkeypatch):
    seen = []
    monkeypatch.setattr(
        aot, "lower_train", lambda name, config, *_: seen.append(config.model.attention)
    )
    for described, attention in ((True, "auto"), (False, "auto"), (True, "manual")):
        config = small_config()
        config.model.attention = attention
        _, (program,) = make(["train"], "pretrain", config, LOCAL._replace(described=described))
        program.lower(16)
    assert seen == ["xla", "auto", "manual"]


def test_a_vocabulary_is_known_without_its_package(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError

    monkeypatch.setattr(tokenizer_lib, "load", missing)
    config = small_config()
    config.data.tokenizer = "gpt2"
    _, (program,) = make(["sampler"], "distill", config)
    assert "50257" in program.lower(16).as_text()


@pytest.mark.parametrize(
    ("mesh", "rows", "message", "fits"),
    [
        ({"fsdp": 3}, 16, "must multiply to the number of devices, 8", (2, 4, 1)),
        (
            {"data": 2, "fsdp": 2, "tensor": 1},
            16,
            "must multiply to the number of devices, 8",
            (4, 2, 1),
        ),
        ({"fsdp": -1, "data": 3}, 16, "must multiply to the number of devices, 8", (1, 8, 1)),
        ({}, 12, "--batch=12 must be a positive multiple of the 8", (4, 1, 2)),
        ({"fsdp": 4}, 12, "--batch=12 must be a positive multiple of the 8", (1, 4, 2)),
        ({"tensor": 8}, 16, "model.num_heads=4 must be a multiple of mesh.tensor=8", (2, 1, 4)),
        ({"slices": 2}, 16, "mesh.slices=2 must be the number of", None),
    ],
)
def test_where_a_mesh_does_not_fit_one_that_does_is_named(mesh, rows, message, fits):
    config = small_config(**mesh)
    config.model.num_heads = 4
    with pytest.raises(ValueError, match=message) as caught:
        make(["sampler"], "distill", config, rows=rows)
    if fits is None:
        assert str(caught.value).endswith("No mesh of the 8 devices fits this network and batch.")
        return
    named = re.findall(r"--config\.mesh\.(\w+)=(\d+)", str(caught.value))
    assert tuple(int(size) for _, size in named) == fits
    config.mesh.update({axis: int(size) for axis, size in named})
    make(["sampler"], "distill", config, rows=rows)


def test_rows_make_whole_parts():
    config = small_config(data=2, fsdp=4)
    config.distill.accumulate = 3
    _, programs = make(aot.KINDS, "distill", config, rows=48)
    assert [program.unit for program in programs] == [24, 8]  # the sampler makes no parts
    make(["sampler"], "distill", config, rows=16)
    make(aot.KINDS, "distill", config, rows=None)
    with pytest.raises(ValueError, match=r"--batch=16 must be a multiple of distill.accumulate=3"):
        make(aot.KINDS, "distill", config, rows=16)


def test_programs_that_cannot_be():
    with pytest.raises(ValueError, match=r"--what takes some of train, sampler, got \['tests'\]"):
        make(["tests"], "distill", small_config())
    with pytest.raises(ValueError, match=r"'autoregressive' has no few-step sampler"):
        make(["sampler"], "autoregressive", small_config())


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:0x4", "v5e:4x", "v9:2x2", "v5e:4x4; rm", "h100:1"]
)
def test_other_names_of_topologies_are_refused(name):
    with pytest.raises(ValueError, match=r"expected 'local' or KIND:SHAPE.*v5e, v5p, v6e"):
        aot.find_target(name)


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=r"pip install 'fsdfm_jax\[tpu\]'"):
        aot.find_target("v5e:2x2")


# ------------------------------------------------------------------------------------- the program


def run(*arguments):
    """Run the program in a separate process with 8 devices, because its flags are global."""
    command = [sys.executable, "-m", "launch.aot_compile", *arguments]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


SMOKE = "--config=configs/tiny.py:smoke"


def test_the_program_prints_what_it_found():
    options = ["--topology=local", "--config.mesh.fsdp=4", "--what=sampler", "--steps=1"]
    found = run(SMOKE, *options, "--stage=pretrain", "--batch=8")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[:2] == [
        "pretrain on local, mesh 2 x 4 x 1, blocks of 64 tokens",
        "sampler, 8 rows",
    ]
    assert re.match(r"  memory of a chip  \S+ of \? GB: may fit \(arguments ", lines[2])
    assert re.search(r"^  all-gather +\d+, \S+ GB$", found.stdout, re.MULTILINE)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SMOKE, "--topology=v5e:4by4"], "Unknown --topology='v5e:4by4'"),
        ([SMOKE, "--topology="], "--topology is empty (an unset shell variable?)"),
        ([SMOKE], "Give --config and --topology"),
        ([SMOKE, "--topology=local", "--batch=12"], "This mesh fits: --config.mesh.data=4"),
    ],
)
def test_wrong_input_is_one_line(arguments, message):
    found = run(*arguments)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert found.stdout == ""


def case(table, **values):
    given = {"table": table, "size": "0.17B", "stage": "distill", "topology": "v5e:4x4"}
    given |= {"data": "1", "fsdp": "16", "tensor": "1", "rows": "96", "changes": ""}
    return given | values


def test_a_table_is_compiled_row_by_row(tmp_path, monkeypatch):
    path, compiled = tmp_path / "cases.csv", []
    rows = [case("one"), case("two", changes="model.remat=none"), case("two", rows="32")]
    with open(path, "w") as stream:
        writer = csv.DictWriter(stream, aot_compile.GIVEN)
        writer.writeheader()
        writer.writerows(rows)

    def describe(given):
        compiled.append(given)
        if len(compiled) == 3:
            raise ValueError("the machine is gone")
        fits = not given["changes"]
        found = {"memory": 2e9, "total": 1e9 if fits else None, "fits": fits, "least_s": 0.136}
        return found | ({"all-gather": 3} if fits else {})

    monkeypatch.setattr(aot_compile, "compile_case", describe)
    monkeypatch.setattr(aot_compile.importlib.metadata, "version", lambda name: "1")
    with pytest.raises(ValueError, match="the machine is gone"):
        aot_compile.compile_cases(path)
    done = aot_compile.compile_cases(path)  # the first two rows aren't compiled again
    assert compiled == [*rows, rows[2]]
    assert [row["compiler"] for row in done] == [f"jax {jax.__version__}, libtpu 1"] * 3
    assert [row["all-gather"] for row in done] == ["3", "", "3"]
    text = "a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\n\n<!-- /two -->\nc\n"
    lines = aot_compile.replace_tables(text, done).splitlines()
    assert [line for line in lines if not line.startswith("| ")] == [
        *("a", "<!-- one -->", "<!-- /one -->", "b", "<!-- two -->", "<!-- /two -->", "c")
    ]
    assert [line for line in lines if "v5e" in line] == [
        "| 0.17B distill | v5e:4x4, 1 x 16 x 1 | 96 | 1.0 of 2.0 | yes | 136 |",
        "| 0.17B distill `model.remat=none` | v5e:4x4, 1 x 16 x 1 | 96 | ? of 2.0 | no | 136 |",
        "| 0.17B distill | v5e:4x4, 1 x 16 x 1 | 32 | 1.0 of 2.0 | yes | 136 |",
    ]
    with pytest.raises(ValueError, match='"<!-- one -->" .. "<!-- /one -->" once, got 0'):
        aot_compile.replace_tables("nothing", done)


def test_the_table_of_the_document_is_that_of_the_file():
    with open(ROOT / "docs" / "reference" / "scaling.csv") as stream:
        rows = list(csv.DictReader(stream))
    text = (ROOT / "docs" / "reference" / "scaling.md").read_text()
    assert aot_compile.replace_tables(text, rows) == text


# ------------------------------------------------------------------------- the real TPU's compiler


def test_a_small_pod_is_compiled_for():
    """One small topology, if the TPU compiler is installed."""
    pytest.importorskip("libtpu")
    found = run(SMOKE, "--topology=v5e:2x4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    assert found.returncode == 0, found.stderr
    assert "distill on v5e:2x4, mesh 2 x 2 x 2, blocks of 64 tokens" in found.stdout
    for kind in ("train, 16 rows", "sampler, 16 rows"):
        assert kind in found.stdout
    assert len(re.findall(r"of 16\.9 GB: fits \(arguments ", found.stdout)) == 2
    assert len(re.findall(r"TFLOP needed of each chip, at least \S+ ms", found.stdout)) == 2
    assert re.search(r"^  all-gather +\d+, \S+ GB$", found.stdout, re.MULTILINE)
