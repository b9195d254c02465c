"""Evaluate trained runs, or any model file.

    python -m fsdfm_jax.evaluate --workdir=runs/tiny --config.eval.temperature=0.9
    python -m fsdfm_jax.evaluate --workdir=runs/tiny --config.eval.judges=autoregressive,gguf:judge.gguf
    python -m fsdfm_jax.evaluate --checkpoint=model.pth --data=runs/tiny/data --output=evaluation
    python -m fsdfm_jax.evaluate --bundled --output=evaluation      # the table of the models' card

Writes the report to --output, by default WORKDIR/report, like the main job. All values of
`config.eval` (configs/base.py) can be set; the others default to those of the model's run. Finished
points are not computed again: a killed evaluation resumes, and one with an additional judge reuses
the stored samples.
"""  # noqa: E501 - a command to copy

import pathlib
from collections.abc import Iterable

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fsdfm_jax import cli, extras
from fsdfm_jax.convert import formats
from fsdfm_jax.convert.formats import BUNDLED, BUNDLED_BASE
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.evaluate.models import Catalogue
from fsdfm_jax.evaluate.plan import Settings
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import pipeline

_CONFIG = cli.define_config("Configuration; its eval section replaces that of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Or any model file or folder.")
_BUNDLED = flags.DEFINE_bool("bundled", False, "Or the models of the package, as in their card.")
_RUNS = flags.DEFINE_list("runs", None, "Runs of the working directory; default: all trained.")
_DATA = flags.DEFINE_string("data", None, "Prepared text; default: that of the run.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the report; default: WORKDIR/report.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", '"gpt2" or a file, if the model has none.')
_NUM_HEADS = flags.DEFINE_integer("num_heads", None, "Heads, for official files without them.")
_SOURCE = flags.DEFINE_enum("source", "", ["", "uniform", "mask"], "Noise, if the file lacks it.")


# Not taken from a model file: these keys name files to open on this machine.
_PLACES = ("judges", "models", "law")


def use_stored(config: ConfigDict, stored: dict, keys: Iterable[str]) -> None:
    """Default values of `config.eval` to the run's, unless set on the command line.

    Sampler settings that older runs and foreign files lack default to the published ones.

    Args:
      config: changed in place, unless --config is given.
      stored: the run's whole configuration, as JSON.
      keys: keys of the eval section to take.

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
    if (bool(_WORKDIR.value), bool(_CHECKPOINT.value), _BUNDLED.value).count(True) != 1:
        raise ValueError("Give one of --workdir=DIR, --checkpoint=PATH and --bundled.")
    if not (_WORKDIR.value or _OUTPUT.value):
        raise ValueError("Give a folder for the report of a checkpoint: --output=DIR.")
    if _RUNS.value and not _WORKDIR.value:
        raise ValueError("--runs selects runs of a working directory; use it with --workdir.")
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
    elif _BUNDLED.value:
        bundles = {path: formats.open_bundle(path) for path in (BUNDLED_BASE, BUNDLED)}
        stored = bundles[BUNDLED].provenance["config"]
        use_stored(config, stored, config.eval.keys())
        settings = Settings.from_config(config.eval)
        places = {b.provenance["run"]: (path, {}) for path, b in bundles.items()}
        further = models_lib.further_places(settings.models)
        catalogue = Catalogue(models_lib.join(places, further))
        config.data.update(stored["data"])
        prepared = prepared or pipeline.prepare(config, pathlib.Path(_OUTPUT.value).expanduser())
    else:
        path = pathlib.Path(_CHECKPOINT.value).expanduser()
        stored = formats.open_bundle(path, **options).provenance.get("config") or {}
        use_stored(config, stored, set(config.eval) - set(_PLACES))
        settings = Settings.from_config(config.eval)
        further = models_lib.further_places(settings.models, **options)
        catalogue = Catalogue(models_lib.join({path.name: (path, options)}, further))
    output = pathlib.Path(_OUTPUT.value or folder / "report").expanduser()
    named = pathlib.Path(_WORKDIR.value or _CHECKPOINT.value or BUNDLED.parent).expanduser()
    header = {"run": named.absolute().name, "config": stored | {"eval": config.eval.to_dict()}}
    if prepared is not None:
        header["data"] = prepared.manifest
    with mesh_lib.use(mesh_lib.local_mesh()):
        print(run_lib.evaluate(settings, catalogue, prepared, output, header=header))
    print(f"\nReport: {output / 'report.html'}, with data files beside it.")


if __name__ == "__main__":
    cli.run(
        main,
        default_config=cli.shared("configs") / "base.py",
        kept="finished points are kept; run the same command to resume",
    )
