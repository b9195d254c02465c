"""Optional packages: using a model imports none of them."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from fsdfm_jax import extras

ROOT = pathlib.Path(__file__).parents[1]
OPTIONAL = sorted({name for names in extras.EXTRAS.values() for name in names})
# Under other names than they are installed by.
INSTALLED = {"tensorflow_datasets": "tensorflow-datasets", "apache_beam": "apache-beam"}

# Any import of an optional package fails, as where it isn't installed.
BLOCKED = f"""
import sys
for name in {[*OPTIONAL, "torch", "transformers", "pandas"]}:
    sys.modules[name] = None
"""


def _setup():
    """install_requires and extras_require, as setup.py gives them to setuptools."""
    code = """
import json, setuptools
setuptools.setup = lambda **fields: print(json.dumps([fields["install_requires"],
                                                      fields["extras_require"]]))
exec(open("setup.py").read(), {"__file__": "setup.py", "__name__": "__main__"})
"""
    import json

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def _names(requirements):
    return {re.split(r"[<>=\[]", each)[0] for each in requirements}


def test_extras_are_those_of_setup():
    required, optional = _setup()
    for extra, packages in extras.EXTRAS.items():
        installed = _names(optional[extra])
        assert {INSTALLED.get(name, name) for name in packages} <= installed, extra
        assert not installed & _names(required)
    for extra in ("demo", "test", "beam"):  # the README's command has all that the main job needs
        assert "fsdfm_jax[train]" in optional[extra]


def test_every_extra_that_a_message_names_is_there():
    optional = _setup()[1]
    for folder in ("fsdfm_jax", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for extra in re.findall(r"fsdfm_jax\[([\w,]+)\]", path.read_text()):
                assert set(extra.split(",")) <= optional.keys(), path
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                    *("extras.needed", "extras.check"),
                ):
                    assert node.args[0].value in extras.EXTRAS, path


def _run(code, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_model_needs_none_of_them(tmp_path):
    done = _run(
        f"""
import fsdfm_jax as fs
model = fs.load()
print(fs.generate(model, sampling=fs.Sampling(steps=1), length=16)[0])
fs.save(model, {str(tmp_path / "model.safetensors")!r})
fs.save_pretrained(model, {str(tmp_path / "folder")!r})
"""
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "folder" / "README.md").is_file()


def test_the_program_generate_needs_none_of_them():
    flags = ["--steps=1", "--num_samples=1", "--length=16"]
    code = "from fsdfm_jax import cli; sys.argv[:] = ['fsdfm', *sys.argv[1:]]; cli.main()"
    done = _run(code, "generate", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("command", "flags", "what"),
    [
        ("train", ["--config=tiny.py:smoke", "--workdir={}"], "Training"),
        ("evaluate", ["--workdir={}"], "Evaluating"),
        ("sweep", ["--config=sweep.py", "--workdir={}"], "A sweep"),
        ("prepare", ["--config=base.py", "--directory={}"], "Preparing text"),
    ],
)
def test_programs_say_in_one_line_what_to_install(tmp_path, command, flags, what):
    code = "from fsdfm_jax import cli; sys.argv[:] = ['fsdfm', *sys.argv[1:]]; cli.main()"
    place = tmp_path / "work"
    done = _run(code, command, *(flag.format(place) for flag in flags))
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    missing = ", ".join(extras.EXTRAS["train"])
    assert last == f'error: {what} needs {missing}; run: pip install "fsdfm_jax[train]"'
    assert not place.exists()


def test_a_late_import_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with (
        pytest.raises(ValueError, match=r"^Batches needs grain; run: pip install .*\[train\]\"$"),
        extras.needed("train", "Batches"),
    ):
        import grain  # noqa: F401
    with pytest.raises(ModuleNotFoundError), extras.needed("train", "Batches"):
        raise ModuleNotFoundError("another", name="fsdfm_jax.flow")
