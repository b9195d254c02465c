"""Speed and memory of a training step, and the effect of each optimisation.

    python -m benchmarks.train --size=0.17B --batch=2 --length=1024

Measures a step of the distillation stage (or of pre-training) with the full optimiser, alternating
with the same step with one optimisation off and with a plain forward pass of one row, the unit of
the ratios. `--cases` selects some; `--output` writes JSON. Weights and tokens are random.

    python -m benchmarks.train --stage=pretrain --size=1.3B --batch=16 --dtype=bfloat16 --cases=ours
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import measure
from fsdfm_jax import stages
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import REMATS
from launch import flops

_STAGE = flags.DEFINE_enum("stage", "distill", ["distill", "pretrain"], "Stage to measure.")
_REMAT = flags.DEFINE_enum("remat", "dots", list(REMATS), "What to rematerialise.")
_UNIT = "forward of one row"

# Case -> changes to the model's config.
CASES = {
    "ours": {},
    "logits written down": {"logits_mib": 0},
    "attention in one piece": {"attention": "manual"},
    "nothing computed again": {"remat": "none"},
    "all of a block again": {"remat": "full"},
}


def overrides_asked() -> dict[str, str | int]:
    """Return the keys of the model's config that the flags set."""
    asked: dict[str, str | int] = {"remat": _REMAT.value}
    if measure.LOGITS_MIB.value is not None:
        asked["logits_mib"] = measure.LOGITS_MIB.value
    return asked


def make_case(name: str, *, stage: str, size: str, length: int, dtype: str, overrides):
    """Return (train_step(state, batch, key), init(key) -> state, rows -> operations, model).

    `overrides` are keys of the model's config; those of the case take precedence.
    """
    config = measure.make_config(size, dtype=dtype, overrides=overrides | CASES[name])
    config.data.block_length = length
    process = measure.make_process(config, measure.vocab_size(size))
    built = stages.make_stage(stage, config, process)
    step, init = measure.make_training(config, built)
    return step, init, functools.partial(flops.step_flops, stage, config, built.model), built.model


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    stage, size, dtype = _STAGE.value, measure.SIZE.value, measure.DTYPE.value
    batch, length = measure.BATCH.value or 2, measure.LENGTH.value
    wanted = measure.wanted(list(CASES))
    if stage == "distill" and batch < 2:
        raise app.UsageError("A distillation step needs at least two rows, one for each loss.")

    overrides = overrides_asked()
    shape = {"stage": stage, "size": size, "length": length, "dtype": dtype}
    result = {"machine": measure.machine(), "batch": batch, "overrides": overrides} | shape
    ceiling = measure.matmul_ceiling(dtype)
    result["matmul_ceiling_tflops"] = ceiling / 1e12
    key = jax.random.key(0)
    tokens_BL = jax.random.randint(key, (batch, length), 0, measure.vocab_size(size))
    held = {}  # one state, donated from case to case: two may not fit

    def taking(compiled):
        def step():
            held["state"], metrics = compiled(held["state"], {"x1": tokens_BL}, key)
            return metrics["loss"]

        return step

    cases, rows = {}, {}
    for name in wanted:
        step, init, needed, model = make_case(name, **shape, overrides=overrides)
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
    # The unit comes second: after a case that frees much memory, page faults would slow it down.
    first = wanted[0]
    cases = {first: cases.pop(first), _UNIT: unit} | cases
    seconds = measure.in_turn(cases, rounds=measure.ROUNDS.value)

    unit_s = statistics.median(seconds[_UNIT])
    unit_rate = flops.forward_flops(model, 1, length) / unit_s
    result |= {"unit_s": unit_s, "unit_of_ceiling": unit_rate / ceiling, "rounds": seconds}
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
                "of_ceiling": needed(batch) / step_s / ceiling,
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
