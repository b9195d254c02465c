"""Errors on the command line: one line on stderr, exit code 2, no traceback."""

import errno
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from absl import flags

from configs import base
from fsdfm_jax import __main__, cli, schema
from fsdfm_jax.parallel import processes

ROOT = pathlib.Path(__file__).parents[1]
BASE = f"--config={ROOT}/configs/base.py"


def _fails(*arguments, module="fsdfm_jax.main"):
    """Run a program that must fail with exit code 2; return its one line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == cli.EXIT_CODE == 2, done.stderr[-2000:]
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_unknown_key_names_the_nearest(tmp_path):
    line = _fails(BASE, "--config.pretrain.num_stps=3", f"--workdir={tmp_path}/run")
    assert "config.pretrain.num_stps" in line
    assert "config.pretrain.num_steps" in line
    assert not (tmp_path / "run").exists()


def test_wrong_type_names_key_and_value(tmp_path):
    line = _fails(BASE, "--config.pretrain.num_steps=many", f"--workdir={tmp_path}/run")
    assert "num_steps" in line
    assert "many" in line


def test_missing_config_file_is_named(tmp_path):
    assert "none.py" in _fails(f"--config={tmp_path}/none.py", f"--workdir={tmp_path}/run")


def test_missing_flag_is_named():
    assert "workdir" in _fails(BASE)


def test_bad_value_inside_a_program(tmp_path):
    line = _fails(BASE, "--config.pipeline=distill", f"--workdir={tmp_path}/run")
    assert "distill.init_from" in line


def test_generate_without_a_working_directory(tmp_path):
    line = _fails(f"--workdir={tmp_path}", module="fsdfm_jax.generate")
    assert f"{tmp_path} is not a working directory" in line


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        ("pretrain.num_stps", "config.pretrain.num_steps"),
        ("model.witdh", "config.model.width"),
        ("sed", "config.seed"),
        ("evals.steps", "config.eval.steps"),
        ("distill.temprature", "config.distill.temperature"),
    ],
)
def test_nearest_keys(wanted, nearest):
    message = schema.unknown_key(wanted, schema.keys(base.get_config()))
    assert f"config.{wanted}:" in message
    # The first of those named is the nearest.
    assert message.split("nearest are ")[1].split(", ")[0].split(";")[0] == nearest


def test_hopeless_keys_point_at_the_file_of_all_keys():
    message = schema.unknown_key("zzzzzzzz", schema.keys(base.get_config()))
    assert "configs/base.py" in message
    assert "nearest" not in message
    assert "configs/sweep.py" in schema.unknown_key("axes.step", ["axes.steps"])


def test_keys_are_the_leaves():
    keys = schema.keys(base.get_config())
    assert {"seed", "pipeline", "pretrain.num_steps", "eval.steps"} <= set(keys)
    assert "pretrain" not in keys
    assert len(keys) == len(set(keys))


class _Stop(Exception):  # noqa: N818
    pass


def _run(monkeypatch, error, *, show_traceback=False):
    """cli.run without absl's start-up, on a main that raises `error`."""

    def main(argv):
        raise error

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    monkeypatch.setattr(cli.app, "run", lambda guarded, flags_parser: guarded(["program"]))
    monkeypatch.setattr(flags.FLAGS["show_traceback"], "value", show_traceback)
    cli.run(main)


@pytest.mark.parametrize("kind", cli.USER_ERRORS)
def test_user_errors_become_one_line(monkeypatch, capsys, kind):
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, kind("give a folder"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: give a folder\n"


@pytest.mark.parametrize(("number", "code"), [(errno.ESTALE, 1), (errno.EIO, 1), (errno.ENOSPC, 2)])
def test_what_passes_by_itself_is_worth_another_try(monkeypatch, number, code):
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, OSError(number, "said"))
    assert stop.value.code == code


def _out_of_memory():
    """What JAX raises where an array is larger than any memory."""
    try:
        jnp.zeros((1 << 60,), jnp.int8).block_until_ready()
    except Exception as error:
        return error
    raise AssertionError("a petabyte was given")


@pytest.mark.parametrize("make", [_out_of_memory, MemoryError])
def test_too_little_memory_is_for_the_user_to_mend(monkeypatch, capsys, make):
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, make())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert re.match(r"error: out of memory \(.+\); use a smaller network, batch, or block", said)
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("place", ["jax", "fsdfm_jax.samples"])
def test_stopped_while_importing(place):
    """By Ctrl-C as the command imports JAX, or as its program imports its own modules."""
    code = f"""
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.argv[:] = ["fsdfm", "generate"]
from fsdfm_jax.__main__ import main
main()
"""
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == processes.STOPPED == __main__.STOPPED
    assert (done.stdout, done.stderr) == ("", "stopped by Ctrl-C: nothing was begun.\n")


def test_traceback_on_request_and_for_our_own_bugs(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        _run(monkeypatch, ValueError("give a folder"), show_traceback=True)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("\nerror: give a folder\n")
    with pytest.raises(_Stop):
        _run(monkeypatch, _Stop())
