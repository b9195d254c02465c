"""Text out of a trained run: `python -m fsdfm_jax.generate --workdir=DIR --steps=8`."""

import pathlib

from absl import app, flags, logging

from fsdfm_jax import cli, data, inference, jumps, stages, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory of a trained run.")
_STAGE = flags.DEFINE_string("stage", "", "Run to sample from; the last one trained by default.")
_STEPS = flags.DEFINE_integer("steps", 8, "Network calls per sample.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 4, "Texts to print.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the samples.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Divides the logits; below 1 is more careful."
)
_JUMP = flags.DEFINE_enum(
    "jump", "", ["", *jumps.RULES], "Jump rule; the config's eval.few_step_jump by default."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Text that every sample begins with.")


def _pick_run(config, folder: pathlib.Path) -> str:
    runs = [run for run, _ in workdir.runs(config)]
    trained = [run for run in runs if workdir.saved_metadata(workdir.stage_directory(folder, run))]
    if not trained:
        raise ValueError(
            f"No stage of {folder} has been trained yet (expected one of {', '.join(runs)}); "
            "run python -m fsdfm_jax.main with this --workdir first."
        )
    return trained[-1]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    folder = pathlib.Path(_WORKDIR.value).expanduser()
    config = workdir.load_config(folder)
    prepared = data.load(workdir.data_directory(folder, config))
    tokenizer = prepared.tokenizer
    process = stages.make_process(
        config.path, num_tokens=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    name = _STAGE.value or _pick_run(config, folder)
    weights = workdir.load_weights(
        workdir.stage_directory(folder, name), tokenizer=tokenizer.fingerprint
    )
    logging.info("Sampling from %s, step %d.", name, weights.step)
    tokens_BL = inference.generate(
        weights,
        process,
        num_samples=_NUM_SAMPLES.value,
        length=prepared.block_length,
        steps=_STEPS.value,
        seed=_SEED.value,
        jump_rule=_JUMP.value or config.eval.few_step_jump,
        temperature=_TEMPERATURE.value,
        prompt=tuple(tokenizer.encode(_PROMPT.value)) if _PROMPT.value else (),
    )
    calls = prepared.block_length if weights.model.causal else _STEPS.value
    for i, ids in enumerate(tokens_BL):
        print(f"--- sample {i + 1} of {len(tokens_BL)}: {name}, {calls} network calls")
        print(tokenizer.decode(ids.tolist()))


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    cli.run(main)
