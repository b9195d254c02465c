"""The public names: they exist, have examples and types, and are imported lazily."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import fsdfm_jax as fs

ROOT = pathlib.Path(__file__).parents[1]
NAMES = list(fs._PUBLIC)


def _run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _example(name):
    return rf"(>>>|\.\.\.) .*\bfs\.{name}\b"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_a_docstring_with_an_example(name):
    value = getattr(fs, name)
    module = importlib.import_module(f"fsdfm_jax.{fs._PUBLIC[name]}")
    assert value is getattr(module, name)
    if callable(value):
        text = inspect.unwrap(value).__doc__
        assert text, name
        assert re.search(_example(name), text), f"{name} has no example"
    else:  # a constant; its module shows it
        assert re.search(_example(name), module.__doc__), f"{name} has no example"


@pytest.mark.parametrize("name", NAMES)
def test_every_function_describes_its_arguments(name):
    value = inspect.unwrap(getattr(fs, name))
    if not inspect.isfunction(value):
        return
    text = inspect.getdoc(value)
    assert "\nArgs:\n" in text
    assert "\nReturns:\n" in text or value.__annotations__["return"] is None
    described = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"^  .*\b{parameter}\b.*:", described, re.M), f"{name}: {parameter}"


def test_every_name_is_listed():
    assert set(NAMES) <= set(fs.__all__)
    assert set(NAMES) <= set(dir(fs))
    assert "__version__" in fs.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        _ = fs.sampel


def test_the_stub_has_the_same_names():
    stub = ast.parse((ROOT / "fsdfm_jax" / "__init__.pyi").read_text())
    imported = {
        alias.asname: node.module.removeprefix("fsdfm_jax.")
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname  # else type checkers take it for private
    }
    assert imported == fs._PUBLIC


def test_a_bare_import_costs_nothing():
    report = _run(
        """
        import sys, time
        began = time.process_time()
        import fsdfm_jax
        took = time.process_time() - began
        heavy = {"jax", "jaxlib", "numpy", "flax", "optax"} & set(sys.modules)
        print(took, *heavy)
        """
    ).split()
    assert not report[1:], report[1:]
    assert float(report[0]) < 0.3  # of this process: other ones on the machine don't count


def test_the_readme_runs(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    printed = _run(f"import os; os.chdir({str(tmp_path)!r})\n{snippet}")
    assert printed.count("My fellow citizens") == 2
