"""Prepares training data: text files to blocks of tokens, for all runs that share a data section.

  python -m launch.prepare_data --config=configs/base.py --directory=DIR
  python -m launch.prepare_data --config=configs/base.py --directory=DIR --engine=beam --workers=8
  python -m launch.prepare_data --verify --directory=DIR

The main job prepares its data itself; this is for a folder that several runs share
(`config.data.directory`), and for more text than one process can get through. See
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
    "directory", "", "Folder to make; the configuration's data.directory if empty."
)
_ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "beam"], "local: this process; beam: a pipeline that can resume."
)
_RUNNER = flags.DEFINE_string("runner", "DirectRunner", "Beam runner, as FlinkRunner.")
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "Processes of the DirectRunner on this machine.", lower_bound=1
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "Further options of the runner, as one string of --NAME=VALUE."
)
_GROUP_MIB = flags.DEFINE_integer(
    "group_mib", 256, "MiB of the corpus in a shard, about; part of what is made.", lower_bound=1
)
_SAMPLE_MIB = flags.DEFINE_integer(
    "sample_mib", 64, "Millions (2^20) of characters that beam trains a BPE on.", lower_bound=1
)
_VERIFY = flags.DEFINE_bool("verify", False, "Check the sums of all files of --directory.")


def beam_options() -> list[str]:
    """The options of Beam's pipeline."""
    options = [f"--runner={_RUNNER.value}", "--default_sdk_harness_log_level=ERROR"]
    if _RUNNER.value == "DirectRunner" and _WORKERS.value > 1:
        options += [
            f"--direct_num_workers={_WORKERS.value}",
            "--direct_running_mode=multi_processing",
        ]
    return options + shlex.split(_BEAM_OPTIONS.value)


def prepare(directory: str) -> prepared_lib.PreparedData:
    """Make what the configuration says."""
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
    """Print what a folder holds."""
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
        print(f"verified {prepared.directory}: {prepared.verify()} files are as they were written")
    elif config is None:
        raise ValueError("give --config=FILE, or --verify to check a folder")
    else:
        prepared = prepare(directory)
        print(f"prepared {prepared.directory}")
    describe(prepared)


if __name__ == "__main__":
    cli.run(
        main,
        kept="finished groups of --engine=beam are kept, else nothing; run the same command again",
    )
