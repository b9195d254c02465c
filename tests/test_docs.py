"""README and docs: valid links and commands, well-formed tutorials.

.ci/run builds the site with warnings as errors and runs the tutorials.
"""

import ast
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import fsdfm_jax as fs
from fsdfm_jax import cli, schema

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "fsdfm_jax/bundled/README.md", *sorted(DOCS.rglob("*.md"))]
PAGES += NOTEBOOKS
# Programs of others that the pages may call.
FOREIGN = {
    *("cd", "docker", "envsubst", "export", "gcloud", "git", "hf", "kubectl", "mypy", "ruff"),
    *("tail", "xpk", "source"),
}
# Modules of others that `python -m` may run.
FOREIGN_MODULES = {"http.server", "mkdocs", "pip", "venv"}


def cells(path, kind):
    """The cells of a notebook, of one kind, as text."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def read(path):
    """The Markdown of a page; of a notebook, its prose and its code in fences."""
    if path.suffix != ".ipynb":
        return path.read_text()
    code = [f"```python\n{cell}\n```" for cell in cells(path, "code")]
    return "\n\n".join(cells(path, "markdown") + code)


def named(path):
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("path", PAGES, ids=named)

# ------------------------------------------------------------------------------------------- links


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def anchors(path):
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", read(path), flags=re.S), re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@every_page
def test_relative_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(read(path))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        assert target.exists(), f"{named(path)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{named(path)}: {link}"


# ---------------------------------------------------------------------------------------- commands


def commands(path):
    """The commands of a page: in bash fences, and as `python -m ..` in the text."""
    text = read(path)
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        block = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block, flags=re.S | re.M)  # here-documents
        yield from split(block.replace("\\\n", " "))
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for code in re.findall(r"`([^`]*)`", prose):
        if code.startswith(("python -m ", "pip install ")):
            yield from split(code.replace("\n", " "))


def split(text):
    """Lists of words, without comments, redirections and variables set before a command."""
    lines = [re.sub(r"(^|\s)#.*$", "", line) for line in text.splitlines()]
    lexer = shlex.shlex(" ; ".join([*lines, ""]), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words, redirected = [], False
    for word in lexer:
        if set(word) <= set("<>"):
            redirected = True
        elif set(word) <= set(";&|"):
            if words:
                yield words
            words = []
        elif not redirected and (words or not re.match(r"\w+=", word)):
            words.append(word)
        redirected = redirected and set(word) <= set("<>")


COMMANDS = [(path, words) for path in PAGES for words in commands(path)]


def module_of(words):
    """The module of this repository that a command runs, and its arguments; None for another."""
    if words[0] == "fsdfm":
        assert words[1] in cli.COMMANDS, words
        return cli.COMMANDS[words[1]][0], words[2:]
    if words[:2] == ["python", "-m"] and words[2] not in {*FOREIGN_MODULES, "pytest"}:
        return words[2], words[3:]
    if words[0].endswith(".sh") and "--" in words:
        return "fsdfm_jax.main", words[words.index("--") + 1 :]
    return None


@pytest.fixture(scope="module")
def known_flags():
    """The flags of each program that the pages run, by its own --helpfull."""
    modules = sorted({found[0] for _, words in COMMANDS if (found := module_of(words))})
    for module in modules:
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    cases = [{"program": module, "arguments": ["--helpfull"]} for module in modules]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "programs.py")],
        input=json.dumps(cases),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    texts = [case["out"] + case["err"] for case in json.loads(done.stdout)]
    found = [set(re.findall(r"--(?:\[no\])?(\w+)", text)) for text in texts]
    return dict(zip(modules, found, strict=True))


def config_keys(spec):
    """The keys of a config; None for a placeholder such as configs/paper.py:SIZE."""
    path, _, argument = spec.partition(":")
    if re.search(r"\.\.|[A-Z]{3}", spec):
        return None
    get_config = runpy.run_path(str(ROOT / path))["get_config"]
    return set(schema.keys(get_config(argument) if argument else get_config()))


@every_page
def test_commands_name_programs_configs_and_flags_that_exist(path, known_flags, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    for page, words in COMMANDS:
        if page != path:
            continue
        found = module_of(words)
        if found is not None:
            check_arguments(*found, known_flags[found[0]])
        if words[0].endswith(".sh") or words[0] == ".ci/run":
            check_script(words)
        elif words[:2] == ["python", "-m"]:
            check_tests(words[3:] if words[2] == "pytest" else [])
        elif words[0] == "python":
            assert (ROOT / words[1]).exists() or words[1].startswith("exported/"), words
        elif words[0] == "pip":
            check_extras(words)
        else:
            assert words[0] in {*FOREIGN, "fsdfm"}, words


def check_arguments(module, arguments, flags):
    specs = [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    keys = config_keys(specs[0] if specs else "configs/base.py")
    for word in arguments:
        if not re.match(r"--\w", word):
            continue
        name = re.match(r"--(?:no)?([\w.]+)", word)[1]
        if name.startswith("config."):
            assert keys is None or name.removeprefix("config.") in keys, (module, word)
        else:
            assert name in flags, (module, word)


def check_script(words):
    text = (ROOT / words[0]).read_text()
    own = words[1 : words.index("--")] if "--" in words else words[1:]
    for word in own:
        if word.startswith("--"):
            assert word.partition("=")[0] in text, words


def check_tests(words):
    for word in words:
        assert not word.startswith(("tests/", "fsdfm_jax/")) or (ROOT / word).exists(), words


def check_extras(words):
    for word in words:
        extras = set(filter(None, re.sub(r".*\[(.*)\].*|.*", r"\1", word).split(",")))
        text = (ROOT / "setup.py").read_text()
        known = set(re.findall(r'^        "(\w+)": (?:\[|TRAIN)', text, re.M))
        assert extras <= known, (words, known)


# ------------------------------------------------------------------------------------------ Python


@every_page
def test_python_is_python_and_its_names_are_public(path):
    for block in re.findall(r"```python\n(.*?)```", read(path), re.S):
        names = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "fs"
        }
        assert names <= {*fs.__all__, "__file__"}, named(path)


def test_every_public_name_has_its_place_in_the_reference():
    described = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    targets = set(re.findall(r"^::: (\S+)$", described, re.M))
    names = [name for name in fs.__all__ if name != "__version__"]
    assert {f"fsdfm_jax.{fs._PUBLIC[name]}.{name}" for name in names} <= targets


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorials_are_stripped_and_have_quick_settings(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    (parameters,) = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assigned = ast.parse("".join(parameters["source"])).body
    names = {node.targets[0].id for node in assigned}
    assert set(notebook["metadata"]["quick"]) <= names
    assert notebook["cells"][0]["source"][0].startswith("# ")
