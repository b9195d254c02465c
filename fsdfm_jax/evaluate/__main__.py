"""Evaluates what has been trained, or any model file.

    python -m fsdfm_jax.evaluate --workdir=runs/tiny --config.eval.temperature=0.9
    python -m fsdfm_jax.evaluate --workdir=runs/tiny --config.eval.judges=autoregressive,gguf:judge.gguf
    python -m fsdfm_jax.evaluate --checkpoint=model.pth --data=runs/tiny/data --output=evaluation

Writes the report into --output, by default WORKDIR/report, where the main job has put its own.
Every value of `config.eval` (configs/base.py) can be set; what is not set is as the model's run had
it. Points that are finished are not computed again: an evaluation that was killed goes on, and one
with a further judge scores the samples that are there.
"""  # noqa: E501 - a command to copy

import pathlib
import sys

from absl import app, flags
from ml_collections import ConfigDict, config_flags

import fsdfm_jax
from fsdfm_jax import cli, data, workdir
from fsdfm_jax.convert import formats
from fsdfm_jax.evaluate import subjects, suite
from fsdfm_jax.evaluate.points import Settings
from fsdfm_jax.evaluate.subjects import Catalogue

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(pathlib.Path(fsdfm_jax.__file__).parents[1] / "configs" / "base.py"),
    "Configuration; given explicitly, its eval section replaces that of the run.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory; or give --checkpoint.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Any model file or folder; or --workdir.")
_RUNS = flags.DEFINE_list("runs", None, "Runs of the working directory; all trained by default.")
_DATA = flags.DEFINE_string("data", None, "Prepared text; by default that of the run.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the report; WORKDIR/report by default.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", '"gpt2" or a file, where the model holds none.')
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Of an official file that doesn't say it.")
_SOURCE = flags.DEFINE_enum("source", "", ["", "uniform", "mask"], "Noise, where unsaid.")


def use_stored(config: ConfigDict, stored: dict, argv: list[str]) -> None:
    """Sets what the command line doesn't say of `config.eval` to what the run was configured with.

    Args:
      config: changed in place.
      stored: the run's whole configuration, as JSON.
      argv: the command line.
    """
    if any(part.startswith(("--config=", "-config=")) for part in argv):
        return
    given = set(config_flags.get_override_values(flags.FLAGS["config"]))
    for key, value in (stored.get("eval") or {}).items():
        if key in config.eval and f"eval.{key}" not in given:  # an older run may have had others
            config.eval[key] = tuple(value) if isinstance(value, list) else value


def _open_checkpoint(path: str, settings: Settings, options: dict) -> Catalogue:
    places = {pathlib.Path(path).name: (pathlib.Path(path).expanduser(), options)}
    return Catalogue(places | subjects.further_places(settings.models))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise ValueError("Give either --workdir=DIR or --checkpoint=PATH, and not both.")
    if _CHECKPOINT.value and not _OUTPUT.value:
        raise ValueError("Give a folder for the report of a checkpoint: --output=DIR.")
    config = _CONFIG.value
    prepared = data.load(_DATA.value) if _DATA.value else None
    if _WORKDIR.value:
        folder = pathlib.Path(_WORKDIR.value).expanduser()
        stored = workdir.load_config(folder).to_dict()
        use_stored(config, stored, sys.argv)
        settings = Settings.from_config(config.eval)
        catalogue, own = subjects.open_workdir(folder, settings.models, _RUNS.value)
        prepared = prepared or own
    else:
        if _RUNS.value:
            raise ValueError("--runs chooses among the runs of a --workdir.")
        options = {"tokenizer": _TOKENIZER.value, "source": _SOURCE.value}
        options["num_heads"] = _NUM_HEADS.value
        bundle = formats.open_bundle(_CHECKPOINT.value, **options)
        stored = bundle.provenance.get("config") or {}
        use_stored(config, stored, sys.argv)
        settings = Settings.from_config(config.eval)
        catalogue = _open_checkpoint(_CHECKPOINT.value, settings, options)
    output = pathlib.Path(_OUTPUT.value or folder / "report").expanduser()
    header = {"config": stored | {"eval": config.eval.to_dict()}}
    if prepared is not None:
        header["data"] = prepared.manifest
    print(suite.evaluate(settings, catalogue, prepared, output, header=header))
    print(f"\nReport: {output / 'report.html'}, with its data beside it.")


if __name__ == "__main__":
    cli.run(main)
