"""Speed and memory of a training step, and what each lever contributes.

    python -m benchmarks.train --size=0.17B --batch=2 --length=1024

One step of the distillation stage (or of pre-training) with the whole optimiser, measured in turn
with the same step without one of the levers, with the literal form of everything, and with a bare
forward pass of one row, the unit of the ratios. `--cases` picks some of them; `--output` writes
JSON. Weights and tokens are random.

    python -m benchmarks.train --stage=pretrain --size=1.3B --batch=16 --dtype=bfloat16 --cases=ours

With `--topology` nothing is run: the step is compiled for TPU chips that aren't there, by the
package libtpu (extra `tpu`), and the table shows what the compiler sets aside on each chip. Rows
are spread over the chips, parameters held on each.

    python -m benchmarks.train --topology=v5p:1x1x1 --size=1.3B --batch=8 --dtype=bfloat16
"""

import dataclasses
import statistics

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import literal, measure
from configs import base
from fsdfm_jax import stages
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import REMATS
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.stages import few_step
from launch import ahead, model_flops

_STAGE = flags.DEFINE_enum(
    "stage", "distill", ["distill", "pretrain"], "Stage whose step is taken."
)
_REMAT = flags.DEFINE_enum("remat", "dots", list(REMATS), "What is computed again.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU to compile for, as v5e:2x4; nothing is run.")
_UNIT = "forward of one row"

# Case -> (how the loss is made, changes of the model's config). None: the stage's own loss.
CASES = {
    "ours": (None, {}),
    "both losses on all rows": ({"average": "features"}, {}),
    "teacher writes logits down": ({"split": True, "average": "logits"}, {}),
    "logits written down": (None, {"logits_mib": 0}),
    "attention in one piece": (None, {"attention": "manual"}),
    "nothing computed again": (None, {"remat": "none"}),
    "all of a block again": (None, {"remat": "full"}),
    "literal": ({}, {"logits_mib": 0, "attention": "manual", "remat": "none"}),
}
_PRETRAIN_CASES = [name for name, (loss, _) in CASES.items() if loss is None]


def overrides_asked() -> dict[str, str | int]:
    """Keys of the model's config that the flags set."""
    asked: dict[str, str | int] = {"remat": _REMAT.value}
    if measure.LOGITS_MIB.value is not None:
        asked["logits_mib"] = measure.LOGITS_MIB.value
    return asked


def make_case(name: str, *, stage: str, size: str, length: int, dtype: str, overrides):
    """(train_step(state, batch, key), init(key) -> state, model) of a case.

    `overrides` are keys of the model's config, which the case itself may change again.
    """
    how, changes = CASES[name]
    overrides = overrides | changes
    config = measure.make_config(size, dtype=dtype, overrides=overrides)
    config.data.block_length = length
    vocab_size = measure.vocab_size(size)
    process = measure.make_process(config, vocab_size)
    built = stages.make_stage(stage, config, process)
    loss = built.loss
    if how is not None:
        below, above = few_step.split_budgets(config.distill, "distill")
        path = few_step.read_path_term(config.distill, below)
        taught = few_step.read_teacher_term(config.distill, above, process)
        loss = literal.make_loss(built.model, process, path, taught, **how)
    step, init = measure.make_training(config, built, loss)
    return step, init, built.model


def compile_ahead(names: list[str], topology: str, *, batch: int, length: int, **shape):
    """What the TPU compiler sets aside on each chip of a topology for a step of each case, GB."""
    target = ahead.find_target(topology)
    mesh = mesh_lib.make_mesh(base.get_config().mesh, devices=target.devices)
    everywhere, spread = NamedSharding(mesh, P()), mesh_lib.batch_sharding(mesh)

    def placed(tree, place):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    table = []
    for name in names:
        step, init, _ = make_case(name, length=length, **shape)
        key = jax.eval_shape(lambda: jax.random.key(0))
        train_state = placed(jax.eval_shape(init, key), everywhere)
        tokens_BL = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        arguments = (train_state, placed({"x1": tokens_BL}, spread), placed(key, everywhere))
        out = (jax.tree.map(lambda _: everywhere, train_state), everywhere)
        with jax.set_mesh(mesh):
            lowered = jax.jit(step, donate_argnums=0, out_shardings=out).lower(*arguments)
        _, memory = ahead.compile_program(lowered, target)
        sizes = {key: memory[key] for key in ("arguments", "temporaries", "total")}
        in_gb = {f"{key}_gb": value and value / 1e9 for key, value in sizes.items()}
        table.append({"case": name, "compile_s": memory["compile_s"]} | in_gb)
    return table


def step_flops(model, stage: str, batch: int, length: int) -> float:
    """Operations that a step needs, nothing computed twice.

    The student three times (forward, and twice as much backward). Of the RK-4 teacher, for the half
    of the rows that it teaches, four passes, the last head for the average.
    """
    student = 3 * model_flops.forward_flops(model, batch, length)
    if stage == "pretrain":
        return student
    return student + 4 * model_flops.forward_flops(model, batch - batch // 2, length)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    stage, size, dtype = _STAGE.value, measure.SIZE.value, measure.DTYPE.value
    batch, length = measure.BATCH.value or 2, measure.LENGTH.value
    wanted = measure.wanted(list(CASES) if stage == "distill" else _PRETRAIN_CASES)
    if stage == "distill" and batch < 2:
        raise app.UsageError("A distillation step needs at least two rows, one for each loss.")

    overrides = overrides_asked()
    shape = {"stage": stage, "size": size, "length": length, "dtype": dtype}
    if _TOPOLOGY.value:
        # What "auto" takes on a TPU: it goes by the device at hand.
        shape["overrides"] = overrides | {"attention": "xla"}
        table = compile_ahead(wanted, _TOPOLOGY.value, batch=batch, **shape)
        measure.print_table(table)
        measure.write(shape | {"topology": _TOPOLOGY.value, "cases": table})
        return

    result = {"machine": measure.machine(), "batch": batch, "overrides": overrides} | shape
    ceiling = measure.matmul_ceiling(dtype)
    result["matmul_ceiling_tflops"] = ceiling / 1e12
    key = jax.random.key(0)
    tokens_BL = jax.random.randint(key, (batch, length), 0, measure.vocab_size(size))
    held = {}  # one state, donated from case to case: two would not fit beside each other

    def taking(compiled):
        def step():
            held["state"], metrics = compiled(held["state"], {"x1": tokens_BL}, key)
            return metrics["loss"]

        return step

    cases, rows = {}, {}
    for name in wanted:
        step, init, model = make_case(name, **shape, overrides=overrides)
        if not held:
            held["state"] = jax.jit(init)(key)
        jitted = jax.jit(step, donate_argnums=0)
        compiled, seconds = measure.compile_timed(jitted, held["state"], {"x1": tokens_BL}, key)
        cases[name] = taking(compiled)
        rows[name] = measure.compiled_gb(compiled) | {"compile_s": seconds}

    params = jax.tree.map(jnp.copy, held["state"].params)
    t_B = jnp.full((1,), 0.5)
    forward = jax.jit(model_lib.apply, static_argnums=1)
    plain = dataclasses.replace(model, attention="auto")
    unit = lambda: forward(params, plain, tokens_BL[:1], t_B, t_B)
    # The unit second: a case that gives back much memory would make it pay for page faults.
    first = wanted[0]
    cases = {first: cases.pop(first), _UNIT: unit} | cases
    seconds = measure.in_turn(cases, rounds=measure.ROUNDS.value)

    unit_s = statistics.median(seconds[_UNIT])
    unit_rate = model_flops.forward_flops(model, 1, length) / unit_s
    result |= {"unit_s": unit_s, "unit_of_ceiling": unit_rate / ceiling, "rounds": seconds}
    needed = step_flops(model, stage, batch, length)
    table = []
    for name in wanted:
        step_s = statistics.median(seconds[name])
        table.append(
            {
                "case": name,
                "step_s": step_s,
                "times_first": measure.ratio(seconds, name, first),
                "units": measure.ratio(seconds, name, _UNIT),
                "tokens_per_s": batch * length / step_s,
                "of_ceiling": needed / step_s / ceiling,
            }
            | rows[name]
        )
    result |= {"cases": table, "peak_gb_of_all": measure.peak_gb()}
    print(
        f"{stage} step, {size}, batch {batch} x {length}, {dtype}: "
        f"matmul ceiling {ceiling / 1e12:.3g} TFLOP/s, one unit ({_UNIT}) {unit_s:.3g} s = "
        f"{unit_rate / ceiling:.0%} of it"
    )
    measure.print_table(table)
    measure.write(result)


if __name__ == "__main__":
    app.run(main)
