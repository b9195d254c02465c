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
from collections.abc import Iterable

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fsdfm_jax import cli, extras
from fsdfm_jax.convert import formats
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.evaluate.models import Catalogue
from fsdfm_jax.evaluate.plan import Settings
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import pipeline

_CONFIG = cli.define_config("Configuration; its eval section then replaces that of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory; or give --checkpoint.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Any model file or folder; or --workdir.")
_RUNS = flags.DEFINE_list("runs", None, "Runs of the working directory; all trained by default.")
_DATA = flags.DEFINE_string("data", None, "Prepared text; by default that of the run.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the report; WORKDIR/report by default.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", '"gpt2" or a file, where the model holds none.')
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Of an official file that doesn't say it.")
_SOURCE = flags.DEFINE_enum("source", "", ["", "uniform", "mask"], "Noise, where unsaid.")


# Of a file from elsewhere numbers are taken, not what it would have this machine open.
_PLACES = ("judges", "models", "law")


def use_stored(config: ConfigDict, stored: dict, keys: Iterable[str]) -> None:
    """Set what the command line doesn't say of `config.eval` to what the run was configured with.

    What older runs and files from elsewhere don't say of the sampler is as published.

    Args:
      config: changed in place; as it is where --config names a file.
      stored: the run's whole configuration, as JSON.
      keys: of the eval section, those that may be taken over.

    Raises:
      ValueError: for a stored value of another type.
    """
    if cli.config_was_given():
        return
    given = set(config_flags.get_override_values(flags.FLAGS["config"]))
    evaluation = stored.get("eval") or {}
    values = {key: value for key, value in evaluation.items() if key in keys and key != "sampling"}
    sampling = bundle_lib.read_sampling(evaluation).to_dict()
    values |= {f"sampling.{name}": value for name, value in sampling.items()}
    values = {key: value for key, value in values.items() if f"eval.{key}" not in given}
    try:
        config.eval.update_from_flattened_dict(
            {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        )
    except TypeError as error:
        raise ValueError(f"The configuration stored with the model: {error}") from None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise ValueError("Give either --workdir=DIR or --checkpoint=PATH, and not both.")
    if _CHECKPOINT.value and not _OUTPUT.value:
        raise ValueError("Give a folder for the report of a checkpoint: --output=DIR.")
    if _CHECKPOINT.value and _RUNS.value:
        raise ValueError("--runs chooses among the runs of a --workdir.")
    extras.check("train", "Evaluating")
    config = _CONFIG.value
    options = {"tokenizer": _TOKENIZER.value, "source": _SOURCE.value}
    options["num_heads"] = _NUM_HEADS.value
    prepared = prepared_lib.load(_DATA.value) if _DATA.value else None
    if _WORKDIR.value:
        folder = pathlib.Path(_WORKDIR.value).expanduser()
        stored = pipeline.load_config(folder).to_dict()
        use_stored(config, stored, config.eval.keys())
        settings = Settings.from_config(config.eval)
        catalogue = models_lib.open_workdir(folder, settings.models, _RUNS.value, **options)
        prepared = prepared or models_lib.prepared_text(folder)
    else:
        path = pathlib.Path(_CHECKPOINT.value).expanduser()
        stored = formats.open_bundle(path, **options).provenance.get("config") or {}
        use_stored(config, stored, set(config.eval) - set(_PLACES))
        settings = Settings.from_config(config.eval)
        further = models_lib.further_places(settings.models, **options)
        catalogue = Catalogue(models_lib.join({path.name: (path, options)}, further))
    output = pathlib.Path(_OUTPUT.value or folder / "report").expanduser()
    named = pathlib.Path(_WORKDIR.value or _CHECKPOINT.value).expanduser().absolute().name
    header = {"run": named, "config": stored | {"eval": config.eval.to_dict()}}
    if prepared is not None:
        header["data"] = prepared.manifest
    with mesh_lib.use(mesh_lib.local_mesh()):
        print(run_lib.evaluate(settings, catalogue, prepared, output, header=header))
    print(f"\nReport: {output / 'report.html'}, with its data beside it.")


if __name__ == "__main__":
    cli.run(
        main,
        default_config=cli.shared("configs") / "base.py",
        kept="finished points are kept; the same command goes on from there",
    )
