"""Optional packages that `pip install fsdfm_jax` omits, and how to install them."""

import contextlib
import importlib.util
from collections.abc import Iterator

# Extra of setup.py -> its packages, by import name.
EXTRAS = {
    "train": (
        *("array_record", "grain", "jinja2", "matplotlib", "pyarrow", "tensorboardX"),
        "tensorflow_datasets",
    ),
    "hub": ("huggingface_hub",),
    "beam": ("apache_beam",),
    "wandb": ("wandb",),
}


@contextlib.contextmanager
def needed(extra: str, purpose: str) -> Iterator[None]:
    """Context for late imports that names the extra to install if a package is missing.

    Args:
      extra: of setup.py, one of `EXTRAS`.
      purpose: subject of the message: "Reading .parquet files".

    Raises:
      ValueError: a package is missing; in one line, with the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fsdfm_jax"):
            raise
        raise ValueError(_remedy(extra, purpose, [error.name or "a package"])) from None


def check(extra: str, purpose: str) -> None:
    """As `needed`, but check all packages of an extra in advance, without importing them."""
    missing = [name for name in EXTRAS[extra] if not _is_there(name)]
    if missing:
        raise ValueError(_remedy(extra, purpose, missing))


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module without a spec, already in memory
        return True


def _remedy(extra: str, purpose: str, missing: list[str]) -> str:
    return f'{purpose} needs {", ".join(missing)}; run: pip install "fsdfm_jax[{extra}]"'
