"""Configuration files: they load, have the same keys, and a run reads every key."""

import collections
import importlib
import pathlib
import sys
import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from fsdfm_jax import main, schema, stages
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.training import loop as loop_lib
from fsdfm_jax.training import optim, pipeline
from fsdfm_jax.training import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[1]
SIZED = ("autoregressive", "pretrain", "step_aware", "distill", "refine")
# Every file of configs/ with its arguments.
ARGUMENTS = {
    "base": [""],
    "tiny": ["", "smoke", "mask"],
    "bundled": [""],
    "sudoku": [f"{size}{recipe}" for size in ("4x4", "6x6", "9x9") for recipe in ("", ",paper")],
    "hmm": ["", "paper"],
    "paper": [*base.SIZES, *(f"{size},{stage}" for size in base.SIZES for stage in SIZED)],
}
ALL = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def _load(name, arg):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_every_file_is_in_the_table():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert files == {*ARGUMENTS, "sweep"}


@pytest.mark.parametrize(("name", "arg"), ALL)
def test_keys_and_types_are_those_of_base(name, arg):
    config, reference = _load(name, arg), base.get_config()
    assert schema.keys(config) == schema.keys(reference)
    for key in schema.keys(reference):
        assert type(_get(config, key)) is type(_get(reference, key)), key


@pytest.mark.parametrize("name", ARGUMENTS)
def test_unknown_argument_is_refused(name):
    with pytest.raises(ValueError, match="'42B'"):
        _load(name, "42B")


def test_the_default_of_the_paper_is_its_smallest_network():
    module = importlib.import_module("configs.paper")
    assert module.get_config() == module.get_config("0.17B")


@pytest.mark.parametrize(("name", "arg"), ALL)
def test_every_file_makes_its_stages(name, arg, tmp_path, monkeypatch):
    config = _load(name, arg)
    if config.eval.law:  # made by a program, and missed before any work is done
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=r"eval\.law: no law in .*fsdfm_jax\.exact"):
            main.check(config, tmp_path)
        config.eval.law = ""
    if config.eval.judges.startswith("package:"):  # one that needn't be installed here
        config.eval.judges = ""
    first = config.pipeline.split(",")[0]
    if first in stages.FEW_STEP:  # starts from weights trained elsewhere
        with pytest.raises(ValueError, match=f"{first}.init_from"):
            main.check(config, tmp_path)
        process = process_lib.make_process(**config.path, num_tokens=2, eos_id=0)
        stages.make_stage(first, config, process)
        return
    entries, _, _ = main.check(config, tmp_path)
    assert ",".join(entry.stage for entry in entries) == config.pipeline
    prepared_lib.DataSpec.from_config(config.data)
    settings = plan_lib.Settings.from_config(config.eval)
    trained = {entry.run: entry.stage for entry in entries}
    assert plan_lib.plan(settings, trained, config.data.block_length)


def _get(config, dotted):
    for part in dotted.split("."):
        config = config[part]
    return config


# ------------------------------------------------------------------------------- the paper's values
PAPER = {
    "data.block_length": 1024,
    "data.tokenizer": "gpt2",
    "model.dropout": 0.1,
    "model.mlp_ratio": 4,
    "model.dtype": "bfloat16",
    "model.conditioning": "official",
    "path.schedule": "polynomial",
    "path.power": 1.0,
    "path.source": "uniform",
    "path.revealed": "jump",
    "optim.b1": 0.9,
    "optim.b2": 0.95,
    "optim.eps": 1e-8,
    "optim.weight_decay": 0.03,
    "optim.clip_norm": 1.0,
    "pipeline": "pretrain,distill",
    "pretrain.num_steps": 1_000_000,
    "pretrain.batch_size": 128,
    "pretrain.learning_rate": 3e-4,
    "pretrain.warmup_steps": 10_000,
    "pretrain.loss": "path",
    "pretrain.time_eps": 1e-3,
    "distill.num_steps": 500_000,
    "distill.batch_size": 96,
    "distill.learning_rate": 1e-5,
    "distill.warmup_steps": 10_000,
    "distill.ema_decay": 0.9995,
    "distill.max_log2_steps": 10,
    "distill.width_weights": "official",
    "distill.time_eps": 1e-3,
    "distill.rate": "cumulative",
    "distill.rate_floor": 1e-8,
    "distill.tau": 2.0**-9,
    "distill.teacher_rule": "rk4",
    "distill.teacher_jump": "cumulative",
    "distill.teacher_end": "literal",
    "distill.divergence": "forward_kl",
    "distill.temperature": 1.0,
    "eval.many_steps": 1024,
    "eval.sampling.jump": "cumulative",
    "eval.sampling.grid": "uniform",
}
# Width, blocks, heads, conditioning width.
PAPER_SIZES = {
    "0.17B": (768, 12, 12, 128),
    "1.3B": (2048, 21, 32, 256),
    "1.7B": (2048, 28, 32, 256),
}


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_values(name):
    config = _load("paper", name)
    assert {key: _get(config, key) for key in PAPER} == PAPER
    model = config.model
    sizes = (model.width, model.num_blocks, model.num_heads, model.cond_width)
    assert sizes == PAPER_SIZES[name]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("0.17B", 0.16e9, 0.18e9), ("1.3B", 1.25e9, 1.35e9), ("1.7B", 1.65e9, 1.75e9)],
)
def test_paper_sizes_are_their_names(name, low, high):
    config = _load("paper", name)
    process = process_lib.make_process(**config.path, num_tokens=50_257, eos_id=50_256)
    stage = stages.make_stage("distill", config, process)
    params = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), stage.model))
    assert low < model_lib.count_params(params) < high


# -------------------------------------------------------------------------------------------- sweep
@pytest.mark.parametrize("arg", ["", "smoke"])
def test_the_sweep_has_the_axes_and_settings_that_are_read(arg):
    config = importlib.import_module("configs.sweep").get_config(arg)
    assert set(config.axes) == set(plan_lib.Axes._fields)
    assert schema.keys(config.eval) == schema.keys(base.get_config().eval)
    assert set(config) == {"name", "axes", "eval"}
    plan_lib.Axes.from_config(config.axes)
    plan_lib.Settings.from_config(config.eval)


def test_the_sweep_refuses_another_argument():
    with pytest.raises(ValueError, match="'42B'"):
        importlib.import_module("configs.sweep").get_config("42B")


# ------------------------------------------------------------------------- a run reads every key
class _Record:
    """Records the dotted keys of a ConfigDict that package code reads by name.

    Iteration by `to_dict`, `items` etc. doesn't count as reading: a recipe contains keys that
    nobody uses as well as any other.
    """

    def __init__(self, config, monkeypatch):
        self.read, self.missing = collections.Counter(), set()
        self._names = {}
        self._register(config, "")
        self._config = config  # keeps the ids in use
        plain = ConfigDict.__getitem__
        internal = {ConfigDict.__getattr__.__code__}

        def getitem(section, key):
            frame = sys._getframe(1)
            while frame.f_code in internal:
                frame = frame.f_back
            prefix = self._names.get(id(section))
            in_package = "/fsdfm_jax/" in frame.f_code.co_filename.replace("\\", "/")
            if prefix is not None and in_package:
                if key in section.keys():  # noqa: SIM118 - `in` may record
                    self.read[prefix + key] += 1
                else:
                    self.missing.add(prefix + key)
            return plain(section, key)

        monkeypatch.setattr(ConfigDict, "__getitem__", getitem)

    def _register(self, section, prefix):
        self._names[id(section)] = prefix
        for key, value in section.items():
            if isinstance(value, ConfigDict):
                self._register(value, f"{prefix}{key}.")


class _Prepared:
    """Prepared data without files."""

    def __init__(self, folder):
        texts = [f"the people of the united states number {i}" for i in range(40)]
        self.tokenizer = tokenizer_lib.train_bpe(texts, 260)
        self.block_length, self.fingerprint, self.manifest = 4, "data", {}
        self.directory = folder

    def num_blocks(self, split):
        return 1_000_000

    def source(self, split):
        return np.zeros((8, self.block_length), np.int32)


def test_a_run_reads_every_key_and_no_other(tmp_path, monkeypatch, capsys):
    """Run main.main without training steps, sampling and files."""
    config = base.get_config()
    config.update_from_flattened_dict(
        {
            "model.width": 8,
            "model.num_blocks": 1,
            "model.num_heads": 1,
            "model.cond_width": 4,
            "model.mlp_ratio": 1,
            "optim.name": "muon",  # reads all keys of the optimiser
            "refine.max_log2_steps": 1,
            "eval.num_samples": 2,
            "eval.batch_size": 2,
        }
    )
    for stage in SIZED:
        config[stage].batch_size = 8
    prepared = _Prepared(tmp_path)
    networks = {}

    def fake_train(stage, settings, *, batches, name, metadata, **others):
        assert isinstance(settings, loop_lib.Settings)
        assert next(batches(0))["x1"].shape == (8, 4)
        networks[name] = stage.model, metadata

    def fake_weights(directory, *, tokenizer, mesh, step=1):
        model, metadata = networks[directory.name]
        shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return workdir_lib.Weights(params, model, metadata, 1)

    def fake_catalogue(folder, trained, further):
        assert list(trained) == list(networks)
        return further

    def fake_evaluate(settings, catalogue, prepared, directory, *, header):
        assert isinstance(settings, plan_lib.Settings)
        assert header["config"] == config.to_dict()
        return "the table"

    monkeypatch.setattr(prepared_lib, "prepare", lambda spec, directory: prepared)
    monkeypatch.setattr(pipeline, "train", fake_train)
    monkeypatch.setattr(workdir_lib, "load_weights", fake_weights)
    fake_metadata = lambda directory, together: (1, networks[directory.name][1])
    monkeypatch.setattr(workdir_lib, "weights_metadata", fake_metadata)
    monkeypatch.setattr(models_lib, "catalogue", fake_catalogue)
    monkeypatch.setattr(run_lib, "evaluate", fake_evaluate)
    given = {"_CONFIG": config, "_WORKDIR": str(tmp_path), "_EVALUATE": True}
    given |= {"_DISTRIBUTED": False, "_PRINT_SHARDING": False}
    for name, value in given.items():
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))

    everything = set(schema.keys(config))
    with monkeypatch.context() as patch:
        record = _Record(config, patch)
        main.main(["main"])
        read = set(record.read)
    assert everything - read == set(), "keys that no run reads"
    assert record.missing == set(), "keys that base.py doesn't have"
    assert "the table" in capsys.readouterr().out


def test_the_record_sees_what_it_should(monkeypatch):
    config = base.get_config()
    with monkeypatch.context() as patch:
        record = _Record(config, patch)
        pipeline.make_process(config, 5)
        config.to_dict()
        _ = config.seed  # read by a test, not by the package
        with pytest.raises(AttributeError):
            optim.make_optimizer(config.optim, config.path)
    leaves = set(record.read)
    path = {"path.schedule", "path.power", "path.source", "path.revealed"}
    assert leaves == path | {"path"}
    assert record.missing == {"path.warmup_steps"}
