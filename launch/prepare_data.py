"""Prepares training data: text files to blocks of tokens, for all runs that share a data section.

  python -m launch.prepare_data --config=configs/base.py --directory=DIR

The main job prepares its data itself; this is for a folder that several runs share
(`config.data.directory`).
"""

from absl import app, flags
from ml_collections import config_flags

from fsdfm_jax import cli, data

_CONFIG = config_flags.DEFINE_config_file("config", help_string="Configuration file.")
_DIRECTORY = flags.DEFINE_string(
    "directory", "", "Folder to make; the configuration's data.directory if empty."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    directory = _DIRECTORY.value or _CONFIG.value.data.directory
    if not directory:
        raise ValueError("give --directory=DIR (the configuration has no data.directory)")
    prepared = data.prepare(data.DataSpec.from_config(_CONFIG.value.data), directory)
    facts = prepared.manifest["tokenizer"]
    print(f"prepared {prepared.directory}")
    print(f"tokenizer: {facts['vocab_size']} tokens, fingerprint {facts['fingerprint']}")
    for split, counts in prepared.manifest["splits"].items():
        print(
            f"{split}: {counts['documents']} documents, {counts['tokens']} tokens, "
            f"{counts['blocks']} blocks of {prepared.block_length}, "
            f"{counts['dropped_tokens']} tokens dropped"
        )
    print(f"fingerprint: {prepared.fingerprint}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    cli.run(main)
