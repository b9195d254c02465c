"""All commands with typical user errors: one line, exit code 2 (or 143)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BASE, SWEEP = (f"--config={ROOT}/configs/{name}.py" for name in ("base", "sweep"))

# A command line with valid flags that fails later, at a missing path.
PROGRAMS = {
    "fsdfm_jax.main": [BASE, "--workdir={work}", "--config.data.corpus={none}/*.txt"],
    "fsdfm_jax.generate": ["--workdir={none}"],
    "fsdfm_jax.evaluate": ["--workdir={none}"],
    "fsdfm_jax.convert": ["{none}", "{none}.pth"],
    "fsdfm_jax.exact": ["--task=nothing"],
    "launch.sweep": [SWEEP, "--workdir={none}"],
    "launch.prepare_data": [BASE, "--directory={none}", "--config.data.corpus={none}/*.txt"],
    "launch.aot_compile": [BASE, "--topology=nothing"],
}
# Flags of places; empty where a variable of the shell isn't set.
PLACES = {
    "fsdfm_jax.main": ["workdir", "coordinator"],
    "fsdfm_jax.generate": ["workdir", "checkpoint", "batch_file", "output"],
    "fsdfm_jax.evaluate": ["workdir", "checkpoint", "data", "output"],
    "fsdfm_jax.convert": [],
    "fsdfm_jax.exact": ["directory"],
    "launch.sweep": ["workdir"],
    "launch.prepare_data": ["directory"],
    "launch.aot_compile": ["topology", "cases", "markdown"],
}
CONFIGURED = [name for name, flags in PROGRAMS.items() if any("config" in part for part in flags)]
CONFIGURED += ["fsdfm_jax.evaluate"]
WRONG_KEY = "--config.eval.stepz=(1,)"


def _cases():
    """{name: (case, exit code, part of the line)}."""
    cases = {}

    def add(name, program, arguments, code, said, **options):
        case = {"program": program, "arguments": arguments, **options}
        cases[f"{program} {name}"] = case, code, said

    for program, good in PROGRAMS.items():
        add("runs", program, good, 2, "error: ")
        add("extra argument", program, [*good, "surplus", "more"], 2, "error: ")
        add("unknown flag", program, [*good, "--no_such_flag=1"], 2, "no_such_flag")
        add("a flag without its value", program, [*good, "--flagfile"], 2, "flagfile")
        add("no such flag file", program, [*good, "--flagfile={none}"], 2, "none")
        if program != "fsdfm_jax.generate":  # which then samples the bundled model
            add("nothing", program, [], 2, "error: ")
        add("help", program, ["-h"], None, "")
        add("Ctrl-C", program, good, 143, "stopped by Ctrl-C: ", interrupt=True)
        for flag in PLACES[program]:
            given = [part for part in good if not part.startswith(f"--{flag}=")]
            message = f"--{flag} is empty"
            add(f"empty --{flag}", program, [*given, f"--{flag}="], 2, message)
            add(f"empty --{flag}, apart", program, [*given, f"--{flag}", " "], 2, message)
    for program in CONFIGURED:
        good = PROGRAMS[program]
        own = [part for part in good if not part.startswith("--config=")]
        nearest = "config.eval.stepz: the nearest are"
        add("unknown key", program, [*good, WRONG_KEY], 2, nearest)
        add("unknown key in a flag file", program, [*good, "--flagfile={flags}"], 2, nearest)
        add("config in a flag file", program, ["--flagfile={named}", *own], 2, nearest)
        add("unknown key in a file", program, ["--config={own}", *own], 2, nearest)
        add("config apart", program, ["--config", "{own}", *own], 2, nearest)
        add("bad value", program, [*good, "--config.eval.seed=-1"], 2, "config.eval.seed must be")
        add("not a config", program, ["--config={text}", *own], 2, "error: ")
    add("nothing at all", "fsdfm_jax", [], None, "usage: fsdfm COMMAND")
    add("-h", "fsdfm_jax", ["-h"], None, "usage: fsdfm COMMAND")
    add("misspelt", "fsdfm_jax", ["trian"], 2, "did you mean 'train'?")
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    places = {
        name: str(folder / name) for name in ("none", "work", "flags", "named", "own.py", "text.py")
    }
    places["own"], places["text"] = places["own.py"], places["text.py"]
    (folder / "flags").write_text(WRONG_KEY + "\n")
    (folder / "named").write_text(f"--config={folder / 'own.py'}\n")
    (folder / "text.py").write_text("this is no Python\n")
    (folder / "own.py").write_text(
        "from configs import base, sweep\n\n\ndef get_config():\n"
        "    config = base.get_config()\n    config.eval.stepz = 3\n    return config\n"
    )
    cases = []
    for case, _, _ in CASES.values():
        arguments = case["arguments"]
        for name, path in places.items():
            arguments = [part.replace(f"{{{name}}}", path) for part in arguments]
        cases.append(case | {"arguments": arguments})
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "programs.py")],
        input=json.dumps(cases),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    known = {"flags", "named", "own.py", "text.py", "__pycache__", "work"}
    left = {path.name for path in folder.iterdir()} - known
    return dict(zip(CASES, json.loads(done.stdout), strict=True)) | {"left": left}


@pytest.mark.parametrize("name", CASES)
def test_each_command_line_ends_with_one_line_and_the_right_code(results, name):
    _, code, said = CASES[name]
    found = results[name]
    assert "Traceback" not in found["err"] + found["out"], found["err"][-2000:]
    if code is None:  # help goes to stdout
        assert found["code"] in (0, 1)  # 1: absl's, after --help
        assert said in found["out"]
        assert len(found["out"].splitlines()) > 5
        return
    assert found["code"] == code, found
    assert found["out"] == ""
    *log, line = found["err"].strip().splitlines()
    assert not log or name == "fsdfm_jax.main runs", log
    assert said in line
    assert line.startswith("stopped by Ctrl-C: " if code == 143 else "error: ")


def test_nothing_is_left_behind(results):
    assert results["left"] == set()
