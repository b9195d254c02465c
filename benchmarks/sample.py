"""Speed and memory of few-step sampling, and the effect of each optimisation.

    python -m benchmarks.sample --size=0.17B --batch=1 --length=1024 --steps=8
    python -m benchmarks.sample --size=0.17B --length=128 --steps=8,1024 --cases=ours

Measures a whole sample of S steps in one call, alternating with the same sample with one
optimisation off and with a plain forward pass of one row, the unit of the ratios. Several step
counts also alternate. Weights and tokens are random. `--output` writes JSON.
"""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import measure
from fsdfm_jax import stages
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.network import model as model_lib
from launch import flops

_UNIT = "forward of one row"

# Case -> changes to the model's config.
CASES = {
    "ours": {},
    "logits written down": {"logits_mib": 0},
    "attention in one piece": {"attention": "manual"},
    "attention by jax.nn": {"attention": "xla"},
}


def make_case(name: str, *, size: str, length: int, dtype: str, mib=None):
    """Return (run(params, key, x0_BL, sampling) -> x_BL, model) of a case."""
    overrides = ({} if mib is None else {"logits_mib": mib}) | CASES[name]
    config = measure.make_config(size, dtype=dtype, overrides=overrides)
    config.data.block_length = length
    vocab_size = measure.vocab_size(size)
    process = measure.make_process(config, vocab_size)
    model = stages.model_config("distill", config.model, vocab_size=vocab_size)
    draw = generate_lib.make_sampler(model, process)

    def run(params, key, x0_BL, sampling):
        return draw(params, key, x0_BL, jnp.zeros(x0_BL.shape, bool), sampling)

    return run, model


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    names = measure.wanted(list(CASES))
    all_steps = measure.numbers(measure.STEPS, least=1)
    size, batch, length = measure.SIZE.value, measure.BATCH.value or 1, measure.LENGTH.value
    dtype, mib = measure.DTYPE.value, measure.LOGITS_MIB.value
    result = {"machine": measure.machine(), "size": size, "batch": batch}
    result |= {"length": length, "dtype": dtype}
    ceiling = measure.matmul_ceiling(dtype)
    result["matmul_ceiling_tflops"] = ceiling / 1e12
    key = jax.random.key(0)
    x0_BL = jax.random.randint(key, (batch, length), 0, measure.vocab_size(size))
    params, cases, rows = None, {}, {}
    for name in names:
        run, model = make_case(name, size=size, length=length, dtype=dtype, mib=mib)
        if params is None:
            init = functools.partial(model_lib.init_params, cfg=model)
            params = jax.jit(lambda key, init=init: measure.filled(init(key)))(key)
        for steps in all_steps:
            sampling = Sampling(steps)
            compiled, seconds = measure.compile_timed(jax.jit(run), params, key, x0_BL, sampling)
            cases[name, steps] = functools.partial(compiled, params, key, x0_BL, sampling)
            rows[name, steps] = measure.compiled_gb(compiled) | {"compile_s": seconds}

    plain = dataclasses.replace(model, attention="auto")
    t_B = jnp.full((1,), 0.5)
    forward = jax.jit(model_lib.apply, static_argnums=1)
    unit = lambda: forward(params, plain, x0_BL[:1], t_B, t_B)
    # The unit comes second: after a case that frees much memory, page faults would slow it down.
    first = next(iter(cases))
    cases = {first: cases.pop(first), _UNIT: unit} | cases
    seconds = measure.in_turn(cases, rounds=measure.ROUNDS.value)

    unit_s = statistics.median(seconds[_UNIT])
    unit_rate = flops.forward_flops(model, 1, length) / unit_s
    named = {" ".join(map(str, k)) if isinstance(k, tuple) else k: v for k, v in seconds.items()}
    result |= {"unit_s": unit_s, "unit_of_ceiling": unit_rate / ceiling, "rounds": named}
    table = []
    for name, steps in rows:
        sample_s = statistics.median(seconds[name, steps])
        needed = steps * flops.forward_flops(model, batch, length)
        table.append(
            {
                "case": name,
                "steps": steps,
                "sample_s": sample_s,
                "times_first": measure.ratio(seconds, (name, steps), first),
                "units": measure.ratio(seconds, (name, steps), _UNIT),
                "units_per_step_and_row": measure.ratio(seconds, (name, steps), _UNIT)
                / (steps * batch),
                "tokens_per_s": batch * length / sample_s,
                "of_ceiling": needed / sample_s / ceiling,
            }
            | rows[name, steps]
        )
    result |= {"cases": table, "peak_gb_of_all": measure.peak_gb()}
    print(
        f"sampling, {size}, batch {batch} x {length}, {dtype}: "
        f"matmul ceiling {ceiling / 1e12:.3g} TFLOP/s, one unit ({_UNIT}) {unit_s:.3g} s = "
        f"{unit_rate / ceiling:.0%} of it"
    )
    measure.print_table(table)
    fewest, most = min(all_steps), max(all_steps)
    if fewest < most and "ours" in names:
        saved = measure.ratio(seconds, ("ours", most), ("ours", fewest))
        result["time_ratio"] = {"steps": [most, fewest], "ratio": saved}
        print(f"{most / fewest:.4g}x fewer steps take {saved:.4g}x less time")
    measure.write(result)


if __name__ == "__main__":
    app.run(main)
