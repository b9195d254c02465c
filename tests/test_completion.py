"""Completion of `fsdfm` in a shell, by bash itself."""

import doctest
import pathlib
import shutil
import subprocess
import sys

import pytest

from fsdfm_jax import cli, completion

ROOT = pathlib.Path(__file__).parents[1]
BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script for bash of two commands, which are asked for their flags."""
    path = tmp_path_factory.mktemp("completion") / "fsdfm"
    path.write_text(completion.script("bash", ["generate", "sweep"], ["base.py", "tiny.py"]))
    return path


def _complete(script, *words, cwd=ROOT):
    """What bash offers for the last of the words of a command line."""
    code = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fsdfm; '
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", code, script, "fsdfm", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@BASH
def test_commands(script):
    assert _complete(script, "") == ["generate", "sweep", "completion"]
    assert _complete(script, "sw") == ["sweep"]
    assert _complete(script, "completion", "") == ["bash", "zsh"]


@BASH
def test_flags_of_a_command(script):
    assert _complete(script, "generate", "--st") == ["--stage=", "--steps=", "--stream"]
    assert _complete(script, "sweep", "--ho") == ["--host="]
    assert _complete(script, "sweep", "--st") == []
    assert _complete(script, "nothing", "--st") == []
    for word in ("--pdb", "--alsolog", "--experimental"):  # of libraries
        assert _complete(script, "generate", word) == []


@BASH
@pytest.mark.parametrize("words", [("--config", "="), ("--config",), ("--config=",)])
def test_config_files(script, tmp_path, words):
    """After "=" as bash cuts it, after a space, and as one word, as zsh has it."""
    (tmp_path / "own.py").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder").mkdir()
    whole = words[0] if words[0].endswith("=") else ""
    before = words[:-1] if whole else words
    offered = lambda word: _complete(script, "sweep", *before, whole + word, cwd=tmp_path)
    named = lambda *names: [whole + name for name in names]
    assert offered("") == named("base.py", "tiny.py", "own.py", "folder/")
    assert offered("ti") == named("tiny.py")


@BASH
def test_other_values_are_files(script, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "model.pth").touch()
    assert _complete(script, "generate", "--checkpoint", "=", "mo", cwd=tmp_path) == ["model.pth"]
    assert _complete(script, "sweep", "--workdir=ru", cwd=tmp_path) == ["--workdir=runs"]


def test_zsh_has_the_same_function(monkeypatch):
    monkeypatch.setattr(completion, "_flags", lambda commands: {name: [] for name in commands})
    bash, zsh = (completion.script(shell, cli.COMMANDS, ["a.py"]) for shell in completion.SHELLS)
    assert bash.split("\n}\n")[0] == zsh.split("\n}\n")[0]
    assert "bashcompinit" in zsh
    assert all(f"    {name}) flags=''" in bash for name in cli.COMMANDS)


def test_flags_are_those_of_the_project():
    assert doctest.testmod(completion).failed == 0


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fsdfm", "completion", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == cli.EXIT_CODE
    assert capsys.readouterr().err.startswith("error: completion is for bash or zsh, got ")
