"""Optional packages: what `pip install fsdfm_jax` alone leaves out, and what to install for it."""

import contextlib
import importlib.util
from collections.abc import Iterator

# Extra of setup.py -> packages that it brings, by the names that they are imported under.
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
    """Around late imports: names the extra to install where one of its packages is missing.

    Args:
      extra: of setup.py, one of `EXTRAS`.
      purpose: what needs it, the subject of the message: "Reading .parquet files".

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
    """As `needed`, for all packages of an extra, before any work is done; imports none of them."""
    missing = [name for name in EXTRAS[extra] if not _is_there(name)]
    if missing:
        raise ValueError(_remedy(extra, purpose, missing))


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module in memory that no file is known of
        return True


def _remedy(extra: str, purpose: str, missing: list[str]) -> str:
    return f'{purpose} needs {", ".join(missing)}; run: pip install "fsdfm_jax[{extra}]"'
