"""The Dockerfiles, by what they say: there is no Docker where the tests run."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from fsdfm_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "launch" / "docker").glob("*.Dockerfile"))
EXTRAS = {"cpu": {"demo"}, "cuda": {"demo", "cuda"}}

each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name.split(".")[0])


def _stages(path):
    """The instructions of each stage, (name, rest of the line); those before FROM apart."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.M))
    stages = [[]]
    for line in filter(None, text.splitlines()):
        name, _, rest = line.partition(" ")
        assert name in {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD"}
        if name == "FROM":
            stages.append([])
        stages[-1].append((name, rest))
    return stages


def test_both_kinds_are_there():
    assert [path.name.split(".")[0] for path in FILES] == list(EXTRAS)


@each
def test_stages_and_images(path):
    before, build, final = _stages(path)
    (version,) = (rest.partition("PYTHON=")[2] for name, rest in before if name == "ARG")
    classifier = f'"Programming Language :: Python :: {version}"'
    assert classifier in (ROOT / "setup.py").read_text()
    assert [build[0], final[0]] == [
        ("FROM", "python:${PYTHON}-slim AS build"),
        ("FROM", "python:${PYTHON}-slim"),
    ]
    assert "://" not in path.read_text()
    names = [name for name, _ in final]
    (user,) = (rest for name, rest in final if name == "USER")
    assert user != "root"
    assert f" {user} " in next(rest for name, rest in final if "useradd" in rest)
    assert names.index("USER") < names.index("ENTRYPOINT")
    entry = json.loads(next(rest for name, rest in final if name == "ENTRYPOINT"))
    assert f'"{entry[0]} = fsdfm_jax.' in (ROOT / "setup.py").read_text()
    (place,) = (rest.split()[-1] for name, rest in build if rest.startswith("python -m venv "))
    assert ("COPY", f"--from=build {place} {place}") in final
    assert any(name == "ENV" and f"PATH={place}/bin:" in rest for name, rest in final)


@each
def test_the_extras_are_there(path):
    (extras,) = re.findall(r'pip install --no-cache-dir "\.\[([\w,]+)\]"', path.read_text())
    assert set(extras.split(",")) == EXTRAS[path.name.split(".")[0]]
    for extra in extras.split(","):
        assert f'        "{extra}": [' in (ROOT / "setup.py").read_text()


@each
def test_what_is_copied_is_all_that_the_installation_reads(path, tmp_path):
    for name, rest in _stages(path)[1]:
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                if (ROOT / source).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, tmp_path / target, ignore=ignored)
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for built in ("fsdfm_jax/share/configs/tiny.py", "fsdfm_jax/bundled/model.safetensors"):
        assert (tmp_path / "build" / "lib" / built).is_file()


@each
def test_the_commands_at_its_head_are_programs(path):
    head = "".join(re.findall(r"^# ?(.*\n)", path.read_text(), flags=re.M)).replace("\\\n", "")
    commands = re.findall(r"docker run .*? fsdfm(?::cuda)? +(\w+)", head)
    assert len(commands) == 2
    assert set(commands) <= cli.COMMANDS.keys()
    assert f"docker build -f launch/docker/{path.name} " in head
