"""The evaluation that ends the main job: every row of the plan, then the report."""

import pathlib

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fsdfm_jax import data as data_lib
from fsdfm_jax import models, stages, workdir
from fsdfm_jax.data import PreparedData
from fsdfm_jax.evaluate import report, rows
from fsdfm_jax.evaluate.judges import AutoregressiveJudge
from fsdfm_jax.evaluate.rows import RowSpec
from fsdfm_jax.workdir import Entry, Weights


def judge_run(pipeline: list[Entry]) -> str | None:
    """The run that scores samples: the pipeline's last autoregressive model, None without one."""
    runs = [entry.run for entry in pipeline if entry.stage == "autoregressive"]
    return runs[-1] if runs else None


def evaluate(
    config: ConfigDict, pipeline: list[Entry], folder: pathlib.Path, prepared: PreparedData
) -> str:
    """Computes the rows that are missing, writes WORKDIR/report, returns the table as text."""
    tokenizer = prepared.tokenizer
    process = stages.make_process(
        config.path, num_tokens=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    weights = {
        entry.run: workdir.load_weights(
            workdir.stage_directory(folder, entry.run), tokenizer=tokenizer.fingerprint
        )
        for entry in pipeline
    }
    judge, judge_weights = None, weights.get(judge_run(pipeline))
    if judge_weights is None:
        logging.warning(
            "The pipeline trains no autoregressive model, so nothing can judge the samples: "
            "the table has no perplexity. Add 'autoregressive' to config.pipeline to get it."
        )
    else:
        judge = AutoregressiveJudge(judge_weights, tokenizer, batch_size=config.eval.batch_size)
    target = folder / "report"

    results, samples = [], {}
    for spec in rows.plan(config, pipeline, prepared.block_length):
        place = target / "rows" / spec.slug
        stamp = rows.protocol(
            spec, config, weights.get(spec.run), judge_weights, prepared.fingerprint
        )
        row = rows.load_finished(place, stamp)
        if row is None:
            tokens_NL, cost = _samples(spec, config, weights, process, prepared)
            row = spec._asdict() | {"slug": spec.slug, "protocol": stamp} | cost
            row |= rows.figures(tokens_NL, judge, tokenizer)
            rows.store(place, tokens_NL, row)
        results.append(row)
        samples[spec.slug] = np.load(place / "samples.npy")
    report.write(target, results, samples, tokenizer, _header(config, weights, prepared))
    return report.table(results)


def _samples(
    spec: RowSpec,
    config: ConfigDict,
    weights: dict[str, Weights],
    process: stages.Process,
    prepared: PreparedData,
) -> tuple[np.ndarray, dict[str, float | None]]:
    """A row's tokens, and what they cost; reading held-out text costs nothing."""
    asked = config.eval
    if spec.run is None:
        tokens_NL = data_lib.validation_blocks(prepared.source("validation"), asked.num_samples)
        return tokens_NL, {"milliseconds_per_sample": None, "compile_seconds": None}
    drawn = rows.draw(
        spec,
        weights[spec.run],
        process,
        num_samples=asked.num_samples,
        batch_size=asked.batch_size,
        length=prepared.block_length,
        seed=asked.seed,
        temperature=asked.temperature,
    )
    return drawn.tokens, {
        "milliseconds_per_sample": 1e3 * drawn.seconds_per_sample,
        "compile_seconds": drawn.compile_seconds,
    }


def _header(config: ConfigDict, weights: dict[str, Weights], prepared: PreparedData) -> dict:
    return {
        "code_version": workdir.code_version(),
        "config": config.to_dict(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters": {run: models.count_params(w.params) for run, w in weights.items()},
        "data": prepared.manifest,
    }
