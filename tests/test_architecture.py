"""Import layers and forbidden constructs, checked in the sources."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "fsdfm_jax"

# A folder, or a module at the top, imports from itself and from those before it.
ORDER = (
    *(
        "extras",
        "io",
        "completion",
        "parallel",
        "schema",
        "cli",
        "ops",
        "flow",
        "network",
        "stages",
    ),
    *("data", "exact", "training", "inference", "convert", "evaluate"),
    *("library", "samples", "generate", "main", "__main__"),
)
# Arrays only: these folders know nothing of flow matching.
NEUTRAL = {"extras": set(), "io": set(), "parallel": set(), "data": {"extras", "io"}}

# Who may import a library at all, and who at module level. Missing: anyone.
ONLY = {
    "flax": {"network.blocks"},
    "orbax": {"training.checkpoint", "parallel.processes"},
    "etils": {"training.checkpoint"},
    "tensorflow_datasets": {"data.tfds"},
    "tokenizers": {"data.tokenizer", "convert.run_exported", "exact.documents", "exact.hmm_fit"},
    "grain": {"data.prepared"},
    "array_record": {"data.shards"},
    "apache_beam": {"data.beam"},
    "tensorboardX": {"training.metrics"},
    "wandb": {"training.metrics"},
    "matplotlib": {"evaluate.report.pictures"},
    "jinja2": {"evaluate.report.page"},
    "optax": {"training.optim", "training.state", "training.loop"},
    "safetensors": {"convert.safetensors", "convert.run_exported"},
    "tensorflow": set(),
    "torch": {"evaluate.judges.huggingface", "convert.modeling_fsdfm"},
    "transformers": {"evaluate.judges.huggingface", "convert.modeling_fsdfm"},
    "huggingface_hub": {"convert.hub"},
    "pocketsphinx": {"evaluate.judges.ngram"},
    "mauve": {"evaluate.mauve"},
    "threadpoolctl": {"evaluate.mauve"},
    "clu": set(),
}
CONFIG_READERS = {
    "main",
    "cli",
    "schema",
    "library",
    "training.optim",
    "training.pipeline",
    "parallel.mesh",
    "evaluate.__main__",
    "stages.base",
    "stages.few_step",
    "stages.pretrain",
    "stages.step_aware",
    "stages.distill",
    "stages.refine",
    "stages.autoregressive",
}
LATE_ONLY = {
    "tensorflow_datasets": {"data.tfds"},
    "grain": set(),
    "array_record": set(),
    "apache_beam": set(),
    "matplotlib": set(),
    # A file that is copied; nothing imports it.
    "torch": {"convert.modeling_fsdfm"},
    "transformers": {"convert.modeling_fsdfm"},
    "huggingface_hub": set(),
    "jinja2": set(),
    "pyarrow": set(),
    "tensorboardX": set(),
    "wandb": set(),
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
EXPORT_PLATFORMS |= {("ops.attention", "cpu")}  # what "auto" goes by


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


def test_every_folder_has_a_place_in_the_order():
    assert {name.split(".")[0] for name in FILES if name} == set(ORDER)


@EACH
def test_imports_point_downwards(name):
    place = name.split(".")[0]
    imported = {other.split(".")[0] for other in _own(TREES[name])} - {place}
    later = {other for other in imported if ORDER.index(other) > ORDER.index(place)}
    assert not later, f"{name} imports {later}, which come after {place}"
    assert imported <= NEUTRAL.get(place, set(ORDER)), f"{place} knows nothing of {imported}"


def test_imports_have_no_circle():
    edges = {name: set(_own(TREES[name])) - {name} for name in FILES if name}
    # A package's own modules import it, not the other way round.
    done = set()
    while ready := {name for name in edges if name not in done and edges[name] <= done}:
        done |= ready
    assert done == set(edges), f"in a circle: {set(edges) - done}"


def test_composition_takes_the_network_as_an_argument():
    for name in FILES:
        if name.startswith("flow."):
            assert not any("network" in other for other in _own(TREES[name])), name


@pytest.mark.parametrize("library", list(ONLY))
def test_libraries_stay_in_their_files(library):
    users = {name for name, tree in TREES.items() if library in _libraries(tree)}
    assert users <= ONLY[library]


OTHERS = [
    path for name in ("configs", "launch", "benchmarks") for path in (ROOT / name).rglob("*.py")
]


@pytest.mark.parametrize("path", [*FILES.values(), *OTHERS], ids=lambda path: path.stem)
def test_libraries_are_used_by_their_public_names(path):
    """Names with an underscore may disappear in the next version: no import, no attribute."""
    tree = ast.parse(path.read_text())
    private = lambda name: name.startswith("_") and not name.startswith("__")
    own = ("fsdfm_jax.", "configs.", "launch.", "benchmarks.")
    imported = [target for target in _imports(tree) if not target.startswith(own)]
    found = [target for target in imported if any(map(private, target.split(".")))]
    names = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and not f"{node.module}.".startswith(own))
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            chain = ast.unparse(node)
            plain = re.fullmatch(r"[\w.]+", chain) and chain.split(".")[0] in names
            if plain and chain != "os._exit":
                found.append(chain)
    assert not found


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
    """JAX's float32 Gumbel noise is cut off at 15.94, which flatters perplexity."""
    used = {ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    for target in used | set(_imports(TREES[name])):
        assert not target.endswith(("random.categorical", "random.gumbel")), f"{name}: {target}"


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


@EACH
def test_modules_and_functions_can_be_read_at_a_sitting(name):
    if name.split(".")[0] in {"flow", "ops", "network", "stages"}:
        assert len(FILES[name].read_text().splitlines()) <= 400
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 100, node.name
