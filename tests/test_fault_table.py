"""Past failures from public bug reports and user mistakes, row by row.

Each row has its correct outcome here; the tests by kind are in test_schema, test_programs,
test_readers, test_data_faults, test_weight_faults, test_lock and test_faults.
"""

import dataclasses
import os
import pathlib
import resource
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base, sweep
from fsdfm_jax import cli, main, schema
from fsdfm_jax.convert import formats
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import checkpoint, pipeline

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ModelConfig(9, 8, 1, 1, 4, mlp_ratio=1, conditioning="official")


def _bundle():
    params = jax.tree.map(np.asarray, model_lib.init_params(jax.random.key(0), MODEL))
    return bundle_lib.from_params(params, MODEL, block_length=4)


# ----------------------------------------------------------- written, and believed without reading
@pytest.mark.parametrize("name", ["a [1]", "[x]", "a*b", "a?b", "{a}", "a b", "é"])
def test_checkpoints_below_any_name_can_be_read_back(tmp_path, name):
    state = {"params": {"w": np.arange(5.0, dtype=np.float32)}}
    places = tmp_path / name / "checkpoints"
    with checkpoint.Checkpoints(places, retention=checkpoint.Retention(1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.save(2, state, {})
    np.testing.assert_array_equal(
        checkpoint.restore_part(places, ("params",))["params"]["w"], state["params"]["w"]
    )
    formats.write(_bundle(), Target(tmp_path / name / "out [x]", "orbax"))
    assert formats.open_bundle(tmp_path / name / "out [x]").params()


def test_a_backslash_is_refused_before_anything_is_written(tmp_path):
    for place in (tmp_path / "a\\b", tmp_path / "a\\b" / "c"):
        with pytest.raises(ValueError, match="backslash.*; choose another folder"):
            checkpoint.Checkpoints(place, retention=checkpoint.Retention())
        with pytest.raises(ValueError, match="backslash"):
            formats.write(_bundle(), Target(place, "orbax"))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------- names, and values of some sections
def test_a_batch_too_small_for_both_losses_is_refused_before_training():
    config = base.get_config()
    config.distill.batch_size = config.distill.accumulate = 8
    config.pipeline = "pretrain,distill"
    process = pipeline.make_process(config, 5)
    with pytest.raises(ValueError, match=r"A batch of 1 row\(s\) is too small for 2 parts"):
        pipeline.stages.make_stage("distill", config, process)


def test_a_kernel_that_is_not_there_is_refused(tmp_path):
    config = base.get_config()
    config.model.attention = "cudnn"
    with pytest.raises(ValueError, match="attention='cudnn' needs a device with that kernel"):
        main.check(config, tmp_path)


@pytest.mark.parametrize(
    ("axis", "value"), [("steps", (1.0,)), ("seeds", ("0",)), ("temperatures", ("1",))]
)
def test_axes_have_types(axis, value):
    config = sweep.get_config()
    config.axes[axis] = value
    with pytest.raises(ValueError, match=rf"config\.axes\.{axis} must be each"):
        schema.check(config)
    with pytest.raises(ValueError, match=rf"config\.axes\.{axis} must be each"):
        plan_lib.Axes.from_config(config.axes)


# ------------------------------------------------------------------------------------- config.json
@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"format": 3}', '{"config": {}}'])
def test_a_working_directory_without_a_configuration_says_so(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        pipeline.load_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_where_the_text_lies_is_stored_for_every_folder(tmp_path, monkeypatch):
    """A relative `data.directory` is that of the folder in which training was started."""
    monkeypatch.chdir(tmp_path)
    config = base.get_config()
    config.data.directory = "text"
    pipeline.save_config(tmp_path / "run", main.with_places(config))
    monkeypatch.chdir("/")
    stored = pipeline.load_config(tmp_path / "run")
    assert pipeline.data_directory(tmp_path / "run", stored) == tmp_path / "text"


def test_a_model_without_its_tokenizer_is_not_converted(tmp_path):
    """Its text was prepared elsewhere, or moved: a file without a tokenizer would be of no use."""
    tokenizer = tokenizer_lib.train_bpe([], 257)
    model = dataclasses.replace(MODEL, vocab_size=257)
    params = jax.tree.map(np.asarray, model_lib.init_params(jax.random.key(0), model))
    bundle = bundle_lib.from_params(params, model, tokenizer=tokenizer, block_length=4)
    formats.write(bundle, Target(tmp_path / "run", "orbax"))
    (tmp_path / "run" / "tokenizer.json").unlink()
    for name in ("m.safetensors", "folder"):
        run = [sys.executable, "-m", "fsdfm_jax.convert", tmp_path / "run", tmp_path / name]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == cli.EXIT_CODE, done.stderr[-2000:]
        (line,) = done.stderr.splitlines()
        assert f"trained with tokenizer {tokenizer.fingerprint}, which is no longer with" in line
        assert "--tokenizer=PATH" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------- users
def test_temperature_zero_is_greedy():
    assert Sampling(temperature=0).temperature == 0
    assert Sampling(temperature=0.0).to_dict()["temperature"] == 0.0


def test_a_full_disk_names_the_place_and_leaves_nothing(tmp_path):
    """Runs in a separate process: the limit that emulates a full disk would affect pytest's log."""
    code = f"from tests import test_fault_table; test_fault_table.fill_disk({str(tmp_path)!r})"
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def fill_disk(folder):
    """Return the output of a run that can't write files of more than 20 kB."""
    folder = pathlib.Path(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    texts = folder / "texts"
    texts.mkdir()
    for i in range(100):
        (texts / f"{i:02}.txt").write_text(f"we the people of the united states {i * 7919} " * 60)
    spec = prepared_lib.DataSpec(f"{texts}/*.txt", "text", "bpe", 300, 8, 0.3)
    with pytest.raises(OSError, match=rf"{folder}/.*; free space"):
        prepared_lib.prepare(spec, folder / "data")
    large = dataclasses.replace(MODEL, width=64)
    params = jax.tree.map(np.asarray, model_lib.init_params(jax.random.key(0), large))
    bundle = bundle_lib.from_params(params, large, block_length=4)
    for name, to in (("m.safetensors", ""), ("folder", "safetensors"), ("run", "orbax")):
        with pytest.raises(OSError, match=rf"{folder}/"):
            formats.write(bundle, Target(folder / name, to))
