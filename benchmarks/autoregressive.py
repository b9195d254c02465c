"""Autoregressive against few-step sampling: tokens per second and latency.

    python -m benchmarks.autoregressive --size=0.17B --length=1024 --steps=8 --batches=1,8
    python -m benchmarks.autoregressive --size=tiny --length=128 --steps=8,1024 --cases=all

The same backbone, causal with a KV cache (one token per call) and bidirectional (one block per
call, few-step conditioning), measured alternately. `--cases=all` adds the causal network without
cache, which computes the whole block for each token. Weights are random, which doesn't affect the
cost. `--output` writes JSON.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import measure
from fsdfm_jax import stages
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference.autoregressive import make_autoregressive_sampler
from fsdfm_jax.network import model as model_lib

_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Batch sizes, comma-separated.")
# Cases of the causal network -> memory.
CAUSAL = {"autoregressive": "cache", "autoregressive, no cache": "none"}
FEW_STEP = "few-step"


def make_cases(
    config, vocab_size: int, *, batch: int, length: int, steps: list[int], names: list[str]
):
    """Make the cases: (name, network calls) -> (jitted sampler of (params, key), its network)."""
    process = measure.make_process(config, vocab_size)
    cases = {}
    for name in names:
        if name in CAUSAL:
            model = stages.model_config("autoregressive", config.model, vocab_size=vocab_size)
            draw = make_autoregressive_sampler(model, length, memory=CAUSAL[name])
            cases[name, length] = jax.jit(_left_to_right(draw, process, batch)), model
            continue
        model = stages.model_config("distill", config.model, vocab_size=vocab_size)
        for count in steps:
            cases[name, count] = jax.jit(_few_step(model, process, batch, length, count)), model
    return cases


def _left_to_right(draw, process, batch):
    first_B = jnp.full((batch,), process.eos_id, jnp.int32)
    return lambda params, key: draw(params, key, first_B, jnp.float32(1.0))


def _few_step(model, process, batch, length, steps):
    draw = generate_lib.make_sampler(model, process)
    nothing_BL = jnp.zeros((batch, length), bool)

    def run(params, key):
        noise_key, key = jax.random.split(key)
        x0_BL = process.source.sample(noise_key, (batch, length))
        return draw(params, key, x0_BL, nothing_BL, Sampling(steps))

    return run


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    possible = [FEW_STEP, *CAUSAL]
    if measure.WANTED.value == ["all"]:
        names = possible
    else:
        names = measure.wanted(possible) if measure.WANTED.value else possible[:2]
    size, length, dtype = measure.SIZE.value, measure.LENGTH.value, measure.DTYPE.value
    steps = measure.numbers(measure.STEPS, least=1)
    vocab_size = measure.vocab_size(size)
    config = measure.make_config(size, dtype=dtype, overrides={})
    key = jax.random.key(0)
    weights, cases, rows = {}, {}, {}
    for batch in measure.numbers(_BATCHES, least=1):
        found = make_cases(config, vocab_size, batch=batch, length=length, steps=steps, names=names)
        for (name, calls), (run, model) in found.items():
            if model not in weights:
                init = functools.partial(model_lib.init_params, cfg=model)
                weights[model] = jax.jit(lambda k, init=init: measure.filled(init(k)))(key)
            compiled, compile_s = measure.compile_timed(run, weights[model], key)
            cases[name, calls, batch] = functools.partial(compiled, weights[model], key)
            rows[name, calls, batch] = measure.compiled_gb(compiled) | {"compile_s": compile_s}
    seconds = measure.in_turn(cases, rounds=measure.ROUNDS.value)
    table = []
    for name, calls, batch in cases:
        sample_s = statistics.median(seconds[name, calls, batch])
        fastest = (FEW_STEP, min(steps), batch)
        table.append(
            {
                "case": name,
                "calls": calls,
                "batch": batch,
                "latency_s": sample_s,
                "tokens_per_s": batch * length / sample_s,
                "times_few_step": measure.ratio(seconds, (name, calls, batch), fastest)
                if fastest in seconds
                else None,
            }
            | rows[name, calls, batch]
        )
    print(
        f"{size}, blocks of {length} tokens, {dtype}, parameters "
        f"{' / '.join(str(model_lib.count_params(p)) for p in weights.values())}"
    )
    measure.print_table(table)
    named = {" ".join(map(str, case)): values for case, values in seconds.items()}
    result = {"machine": measure.machine(), "size": size, "length": length, "dtype": dtype}
    measure.write(result | {"cases": table, "rounds": named, "peak_gb": measure.peak_gb()})


if __name__ == "__main__":
    app.run(main)
