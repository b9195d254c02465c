"""The rows of the result table: samples and figures. A finished row is not computed twice."""

import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fsdfm_jax import inference, jumps, models, sampler, workdir, writer
from fsdfm_jax.evaluate import metrics
from fsdfm_jax.evaluate.judges import AutoregressiveJudge
from fsdfm_jax.stages import Process
from fsdfm_jax.tokenizer import Tokenizer
from fsdfm_jax.workdir import Weights
from fsdfm_jax.writer import Progress


class RowSpec(NamedTuple):
    """One row.

    Attributes:
      group: what a curve in the picture joins, "pretrain (cumulative)".
      run: the training run sampled from, or None for real text.
      steps: network calls per sample, or None for real text.
      jump: rule of the jumps, or None where there are none.
    """

    group: str
    run: str | None
    steps: int | None
    jump: str | None

    @property
    def slug(self) -> str:
        """File name of the row's samples."""
        parts = (
            self.run or "real",
            self.jump,
            None if self.steps is None else f"{self.steps}steps",
        )
        return "-".join(part for part in parts if part)


def plan(config: ConfigDict, pipeline: list[workdir.Entry], length: int) -> list[RowSpec]:
    """All rows of a run, best reference first.

    Raises:
      ValueError: for values of `config.eval` that can't be sampled with.
    """
    asked = config.eval
    if asked.num_samples < 1 or asked.batch_size < 1:
        raise ValueError(
            "eval.num_samples and eval.batch_size must be at least 1, got "
            f"{asked.num_samples} and {asked.batch_size}."
        )
    if not asked.temperature > 0:
        raise ValueError(f"eval.temperature must be greater than 0, got {asked.temperature}.")
    for key, steps in (("steps", asked.steps), ("many_steps", (asked.many_steps,))):
        if min(steps, default=1) < 1:
            raise ValueError(f"eval.{key} must be at least 1, got {steps}.")
    for key, rules in (("jumps", asked.jumps), ("few_step_jump", (asked.few_step_jump,))):
        unknown = [rule for rule in rules if rule not in jumps.RULES]
        if unknown:
            raise ValueError(
                f"eval.{key} names the unknown rule {unknown[0]!r}; expected one of "
                f"{', '.join(jumps.RULES)}."
            )
    rows = [RowSpec("held-out text", None, None, None)]
    for run, stage, _ in pipeline:
        if stage == "autoregressive":
            rows.append(RowSpec(run, run, length, None))
        elif stage == "pretrain":
            rows.append(RowSpec(f"{run} (cumulative)", run, asked.many_steps, "cumulative"))
            rows += [RowSpec(f"{run} ({j})", run, s, j) for j in asked.jumps for s in asked.steps]
        else:
            rows += [RowSpec(run, run, s, asked.few_step_jump) for s in asked.steps]
    return list(dict.fromkeys(rows))


class Samples(NamedTuple):
    """Samples int32 [N, L]; seconds per sample of the fastest batch; seconds of compilation."""

    tokens: np.ndarray
    seconds_per_sample: float
    compile_seconds: float


def draw(
    spec: RowSpec,
    weights: Weights,
    process: Process,
    *,
    num_samples: int,
    batch_size: int,
    length: int,
    seed: int,
    temperature: float,
) -> Samples:
    """Draws a row's samples, batch after batch; the last batch is computed whole and cut.

    The noise of a row depends on seed and batch only, so that rows are compared on the same noise.
    """
    steps = None if weights.model.causal else spec.steps
    compiled, compile_seconds = _compile(
        weights.model, process, spec.jump, steps, batch_size, length
    )
    batches = -(-num_samples // batch_size)
    drawn, seconds = [], []
    with Progress(f"sampling {spec.slug}", total=batches * batch_size) as progress:
        for key in jax.random.split(jax.random.key(seed), batches):
            inputs = _inputs(weights.model, process, steps, batch_size, length, key, temperature)
            inputs = jax.block_until_ready(inputs)
            began = time.perf_counter()
            drawn.append(np.asarray(compiled(weights.params, *inputs)))
            seconds.append(time.perf_counter() - began)
            progress.advance(batch_size)
    tokens_NL = np.concatenate(drawn)[:num_samples].astype(np.int32)
    if batches == 1:  # the first call of a program pays for more than its work
        began = time.perf_counter()
        jax.block_until_ready(compiled(weights.params, *inputs))
        seconds.append(time.perf_counter() - began)
    return Samples(tokens_NL, min(seconds) / batch_size, compile_seconds)


def _inputs(model, process, steps, batch_size, length, key, temperature):
    """The arguments of a sampler after the parameters."""
    temperature = jnp.float32(temperature)
    if steps is None:
        return key, jnp.full((batch_size,), process.eos_id, jnp.int32), temperature
    noise_key, sample_key = jax.random.split(key)
    x0_BL = process.source.sample(noise_key, (batch_size, length))
    frozen_BL = jnp.zeros((batch_size, length), bool)
    grid_S1 = jnp.asarray(sampler.uniform_grid(steps))
    return sample_key, x0_BL, frozen_BL, grid_S1, temperature


@functools.lru_cache(maxsize=32)
def _compile(model, process, jump, steps, batch_size, length):
    """A shape's compiled sampler, shared by all stages of one network, and seconds of compiling."""
    if steps is None:
        run = inference.make_autoregressive_sampler(model, length, process.source.mask_id)
    else:
        run = inference.make_sampler(model, process, jump)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: models.init_params(key, model))
    inputs = _inputs(model, process, steps, batch_size, length, key, 1.0)
    began = time.perf_counter()
    compiled = run.lower(params, *inputs).compile()
    return compiled, time.perf_counter() - began


def figures(
    tokens_NL: np.ndarray, judge: AutoregressiveJudge | None, tokenizer: Tokenizer
) -> dict[str, float | None]:
    """Unigram entropy, and perplexity in aggregation A (raw ids) and B (decoded, tokenised anew).

    Perplexities are None without a judge.
    """
    entropy = float(np.mean(metrics.unigram_entropy(tokens_NL)))
    result = {
        "perplexity_a": None,
        "perplexity_b": None,
        "entropy_nats": entropy,
        "entropy_bits": entropy * metrics.BITS_PER_NAT,
    }
    if judge is None:
        return result
    by_ids = judge.score_ids(tokens_NL)
    by_text = judge.score_text([tokenizer.decode(row.tolist()) for row in tokens_NL])
    return result | {
        "perplexity_a": metrics.perplexity_a(by_ids.nll, by_ids.tokens),
        "perplexity_b": metrics.perplexity_b(by_text.nll, by_text.tokens),
    }


def protocol(
    spec: RowSpec,
    config: ConfigDict,
    weights: Weights | None,
    judge: Weights | None,
    data_fingerprint: str,
) -> dict[str, Any]:
    """Everything a row's figures depend on, stored beside them."""
    stamp = {
        "judge": judge and _describe(judge),
        "num_samples": config.eval.num_samples,
        "data": data_fingerprint,
        "code": workdir.code_digest(),
    }
    if weights is None:
        return stamp
    return stamp | {
        "model": _describe(weights),
        "steps": spec.steps,
        "jump": spec.jump,
        "grid": None if spec.jump is None else "uniform",
        "temperature": config.eval.temperature,
        "seed": config.eval.seed,
        "batch_size": config.eval.batch_size,
        "draw": "tree of inverse CDFs, float32",
    }


def _describe(weights: Weights) -> dict[str, Any]:
    return {
        "run": weights.metadata["run"],
        "step": weights.step,
        "weights": weights.metadata["weights"],
        "recipe": workdir.digest(weights.metadata["recipe"]),
    }


def load_finished(directory: pathlib.Path, stamp: dict[str, Any]) -> dict[str, Any] | None:
    """The stored row if it was computed under exactly this protocol."""
    path = directory / "row.json"
    if not path.is_file() or not (directory / "samples.npy").is_file():
        return None
    row = writer.read_json(path)
    if row["protocol"] != stamp:
        return None
    # JSON has no nan and inf; the writer stores them as strings.
    return {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()}


def store(directory: pathlib.Path, tokens_NL: np.ndarray, row: dict[str, Any]) -> None:
    """Writes a finished row: samples first, so that row.json marks it complete."""
    (directory / "row.json").unlink(missing_ok=True)
    writer.write_array(directory / "samples.npy", tokens_NL)
    writer.write_json(directory / "row.json", row)
