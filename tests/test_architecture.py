"""What may import what, and what may not stand in the package at all; read from the sources."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fsdfm_jax"

# Every file of the package with its floor; a file imports from its own floor and those below. A new
# file has to be given a place here.
FLOORS = {
    0: (
        *("schedules", "sources", "budgets", "draws", "loops", "logits", "attention", "layout"),
        "ngrams",
    ),
    1: ("paths", "jumps", "neighbours"),
    2: ("losses", "models"),
    3: ("teacher", "sampler"),
    4: (
        "stages",
        "stages.few_step",
        "stages.pretrain",
        "stages.step_aware",
        "stages.distill",
        "stages.refine",
        "stages.autoregressive",
    ),
    5: (
        "inference",
        "prompts",
        "trajectory",
        "workdir",
        "evaluate",
        "evaluate.judges",
        "evaluate.scoring",
        "evaluate.huggingface_judge",
        "evaluate.ngram_judge",
        "evaluate.metrics",
        "evaluate.mauve",
        "evaluate.memorised",
        "evaluate.bound",
        "evaluate.pictures",
        "evaluate.html",
        "evaluate.page",
        "evaluate.reading",
        "evaluate.report",
        "evaluate.draw",
        "evaluate.engine",
        "evaluate.held_out",
        "evaluate.points",
        "evaluate.stamps",
        "evaluate.store",
        "evaluate.subjects",
        "evaluate.suite",
        "evaluate.summary",
        "evaluate.tasks",
        "convert",
        "convert.bundle",
        "convert.formats",
        "convert.parity",
        "convert.run_folder",
        "convert.safetensors_file",
        "convert.exported",
        "convert.run_exported",
        "convert.official",
        "convert.torch_file",
    ),
    6: ("train", "main", "generate", "cli", "convert.__main__", "evaluate.__main__"),
}
# Arrays only: these know nothing of flow matching. Value: what of the package each may import.
TOWER = {
    "sharding": ("layout",),  # the tables
    "optim": (),
    "processes": (),
    "state": ("models", "layout", "loops"),  # the type of parameters
    "checkpoint": ("checksums", "processes"),
    "checksums": (),
    "tokenizer": (),
    "corpus": ("tokenizer",),
    "packing": ("corpus", "tokenizer"),
    "shards": (),
    "mixture": (),
    "tfds_builder": ("corpus", "packing", "tokenizer"),
    "data": ("corpus", "mixture", "shards", "tfds_builder", "tokenizer"),
    "beam_prepare": ("corpus", "data", "packing", "shards", "tokenizer"),
    "writer": (),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

# Who may import a library at all, and who at module level. Missing: anyone.
ONLY = {
    "flax": {"models"},
    "orbax": {"checkpoint"},
    "etils": {"checkpoint"},
    "tensorflow_datasets": {"tfds_builder"},
    "tokenizers": {"tokenizer", "convert.run_exported"},
    "grain": {"data"},
    "array_record": {"shards"},
    "apache_beam": {"beam_prepare"},
    "tensorboardX": {"writer"},
    "matplotlib": {"evaluate.pictures"},
    "optax": {"optim", "state", "train"},
    "safetensors": {"convert.safetensors_file"},
    "tensorflow": set(),
    "torch": {"evaluate.huggingface_judge"},
    "transformers": {"evaluate.huggingface_judge"},
    "pocketsphinx": {"evaluate.ngram_judge"},
    "mauve": {"evaluate.mauve"},
    "threadpoolctl": {"evaluate.mauve"},
    "clu": set(),
}
CONFIG_READERS = {
    "main",
    "cli",
    "optim",
    "sharding",
    "workdir",
    "evaluate.__main__",
    "stages",
    "stages.few_step",
    "stages.pretrain",
    "stages.step_aware",
    "stages.distill",
    "stages.refine",
    "stages.autoregressive",
}
# Who may say "categorical": the draws themselves and who draws with them.
DRAWERS = {"draws", "sampler"}
LATE_ONLY = {
    "tensorflow_datasets": {"tfds_builder"},
    "grain": set(),
    "array_record": set(),
    "apache_beam": set(),
    "matplotlib": set(),
    "torch": set(),
    "transformers": set(),
    "pocketsphinx": set(),
    "mauve": set(),
    "threadpoolctl": set(),
}
DEVICES = ("cuda", "tpu", "gpu", "cpu")
# A string that begins so is a path of some machine.
ABSOLUTE = re.compile(r"(/|~/)\w+/|/(home|root|tmp|work|usr|opt|mnt|data|etc|var)\b")
# Names of `jax.nn.dot_product_attention`'s implementations, not of devices.
ATTENTION_NAMES = {"auto", "manual", "blocked", "xla", "cudnn"}
# The kinds of device that an exported program is lowered for.
EXPORT_PLATFORMS = {("convert.exported", device) for device in ("cpu", "cuda", "tpu")}
EXPORT_PLATFORMS |= {("attention", "cpu")}  # what "auto" goes by


def _name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
EACH = pytest.mark.parametrize("name", [name for name in FILES if name])


def _imports(tree, *, module_level=False):
    """Absolute dotted names that a module imports, "a.b.c" for `from a.b import c`."""
    for node in tree.body if module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own(tree):
    """Modules of the package that a module imports, by their names in the tables."""
    for target in _imports(tree):
        if target == "fsdfm_jax" or not target.startswith("fsdfm_jax."):
            continue
        parts = target.split(".")[1:]
        while parts and ".".join(parts) not in FILES:
            parts.pop()
        if parts:  # else a name of the package itself, as its version
            yield ".".join(parts)


def _libraries(tree, *, module_level=False):
    return {target.split(".")[0] for target in _imports(tree, module_level=module_level)}


def _strings(tree):
    """All string constants but docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_string and id(node) not in docstrings:
            yield node.lineno, node.value


def test_every_file_has_one_place():
    names = [name for names in FLOORS.values() for name in names] + list(TOWER)
    assert sorted(names) == sorted(name for name in FILES if name)


@EACH
def test_imports_point_downwards(name):
    imported = set(_own(TREES[name])) - {name}
    if name in TOWER:
        assert imported <= set(TOWER[name])
        return
    floor = FLOOR_OF[name]
    higher = {other for other in imported if FLOOR_OF.get(other, -1) > floor}
    assert not higher, f"{name} (floor {floor}) imports {higher}"
    if floor < 4:
        assert not imported & set(TOWER), "the lower floors are pure"


def test_imports_have_no_circle():
    edges = {name: set(_own(TREES[name])) - {name} for name in FILES if name}
    # A package's own modules import it, not the other way round.
    done = set()
    while ready := {name for name in edges if name not in done and edges[name] <= done}:
        done |= ready
    assert done == set(edges), f"in a circle: {set(edges) - done}"


def test_composition_takes_the_network_as_an_argument():
    for name in ("teacher", "sampler", "jumps", "paths", "losses"):
        assert "models" not in set(_own(TREES[name])), name


@pytest.mark.parametrize("library", list(ONLY))
def test_libraries_stay_in_their_files(library):
    users = {name for name, tree in TREES.items() if library in _libraries(tree)}
    assert users <= ONLY[library]


@pytest.mark.parametrize("library", list(LATE_ONLY))
def test_slow_libraries_are_imported_late(library):
    users = {name for name, tree in TREES.items() if library in _libraries(tree, module_level=True)}
    assert users <= LATE_ONLY[library]


def test_config_dicts_are_known_to_few():
    users = {name for name, tree in TREES.items() if "ml_collections" in _libraries(tree)}
    assert users == CONFIG_READERS


def test_configs_import_only_ml_collections_and_each_other():
    for path in sorted((ROOT / "configs").glob("*.py")):
        imported = set(_imports(ast.parse(path.read_text())))
        own = {"ml_collections", "configs.base", "configs.quality", "configs.tiny"}
        assert imported <= own | {"functools", "typing.NamedTuple"}, path.name


@EACH
def test_no_paths_and_no_devices(name):
    for line, text in _strings(TREES[name]):
        where = f"{FILES[name]}:{line}: {text!r}"
        assert not ABSOLUTE.match(text), where
        if text not in ATTENTION_NAMES and (name, text) not in EXPORT_PLATFORMS:
            words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
            assert not set(words) & set(DEVICES), where


@EACH
def test_draws_are_the_projects_own(name):
    """JAX's float32 Gumbel noise is cut off at 15.94, which flatters perplexity: see draws.py."""
    used = {getattr(node, "attr", None) for node in ast.walk(TREES[name])}
    imported = {target.split(".")[-1] for target in _imports(TREES[name])}
    assert not (used | imported) & {"categorical", "gumbel"} or name in DRAWERS, name


@EACH
def test_no_old_jax_and_no_assert(name):
    for node in ast.walk(TREES[name]):
        where = f"{FILES[name]}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), where
        used = {getattr(node, "id", None), getattr(node, "attr", None)}
        assert not used & {"PRNGKey", "pmap", "pjit", "xmap"}, where
    old = ("pjit", "pmap", "PRNGKey")
    assert not [t for t in _imports(TREES[name]) if t.split(".")[-1] in old]


@EACH
def test_files_and_public_names_have_docstrings(name):
    if not FILES[name].read_text():  # an empty __init__.py
        return
    assert ast.get_docstring(TREES[name]), f"{FILES[name]} says nothing of itself"
    missing = [
        node.name
        for node in TREES[name].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and node.name != "main"  # of a program; its module describes it
    ]
    assert not missing, missing
