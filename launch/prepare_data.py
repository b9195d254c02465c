"""Prepare training data: text files to blocks of tokens, shared by runs with the same data section.

  python -m launch.prepare_data --config=configs/base.py --directory=DIR
  python -m launch.prepare_data --config=configs/base.py --directory=DIR --engine=beam --workers=8
  python -m launch.prepare_data --verify --directory=DIR

The main job prepares its data itself. Use this command for a folder that several runs share
(`config.data.directory`), and for more text than one process can handle. See
docs/guides/your-text.md.
"""

import functools
import logging
import shlex

from absl import app, flags

from fsdfm_jax import cli, extras
from fsdfm_jax.data import beam
from fsdfm_jax.data import prepared as prepared_lib

_CONFIG = cli.define_config("Configuration file.")
_DIRECTORY = flags.DEFINE_string(
    "directory", "", "Output folder. Default: data.directory of the configuration."
)
_ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "beam"], "local: this process; beam: a resumable Beam pipeline."
)
_RUNNER = flags.DEFINE_string("runner", "DirectRunner", "Beam runner, e.g. FlinkRunner.")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Processes of the DirectRunner on this machine.", lower_bound=1
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "More options for the runner, as one string of --NAME=VALUE."
)
_GROUP_MIB = flags.DEFINE_integer(
    "group_mib", 256, "Approximate MiB of corpus per shard; changes the output.", lower_bound=1
)
_SAMPLE_MIB = flags.DEFINE_integer(
    "sample_mib", 64, "Millions (2^20) of characters to train a BPE on, with beam.", lower_bound=1
)
_VERIFY = flags.DEFINE_bool("verify", False, "Check the checksums of all files in --directory.")


def beam_options() -> list[str]:
    """Return the options of the Beam pipeline."""
    options = [f"--runner={_RUNNER.value}", "--default_sdk_harness_log_level=ERROR"]
    if _RUNNER.value == "DirectRunner" and _WORKERS.value > 1:
        options += [
            f"--direct_num_workers={_WORKERS.value}",
            "--direct_running_mode=multi_processing",
        ]
    return options + shlex.split(_BEAM_OPTIONS.value)


def prepare(directory: str) -> prepared_lib.PreparedData:
    """Prepare the data of the configuration in `directory`."""
    spec = prepared_lib.DataSpec.from_config(_CONFIG.value.data)
    if _ENGINE.value == "local":
        return prepared_lib.prepare(spec, directory)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)  # else hundreds of lines
    return beam.prepare(
        spec,
        directory,
        functools.partial(beam.run_on_beam, options=beam_options()),
        group_bytes=_GROUP_MIB.value << 20,
        sample_characters=_SAMPLE_MIB.value << 20,
    )


def describe(prepared: prepared_lib.PreparedData) -> None:
    """Print a summary of the prepared data."""
    facts = prepared.manifest["tokenizer"]
    print(f"tokenizer: {facts['vocab_size']} tokens, fingerprint {facts['fingerprint']}")
    for split, counts in prepared.manifest["splits"].items():
        parts = [f"{counts['blocks']} blocks of {prepared.block_length}"]
        if "documents" in counts:  # a mixture has only blocks
            parts = [f"{counts['documents']} documents", f"{counts['tokens']} tokens", *parts]
            parts.append(f"{counts['dropped_tokens']} tokens dropped")
        print(f"{split}: {', '.join(parts)}")
    print(f"fingerprint: {prepared.fingerprint}")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    extras.check("train", "Preparing text")
    config = _CONFIG.value
    directory = _DIRECTORY.value or (config.data.directory if config else "")
    if not directory:
        raise ValueError("give --directory=DIR (the configuration has no data.directory)")
    if _VERIFY.value:
        prepared = prepared_lib.load(directory)
        print(f"verified {prepared.directory}: the checksums of {prepared.verify()} files match")
    elif config is None:
        raise ValueError("give --config=FILE, or --verify to check a folder")
    else:
        prepared = prepare(directory)
        print(f"prepared {prepared.directory}")
    describe(prepared)


if __name__ == "__main__":
    cli.run(
        main,
        kept="only finished groups of --engine=beam are kept; run the same command again",
    )
