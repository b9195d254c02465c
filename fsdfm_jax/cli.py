"""What the programs share: flags that explain themselves, and errors of one line."""

import difflib
import re
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import ConfigDict

# What a user can mend; anything else is a bug of ours and keeps its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError, PermissionError)

EXIT_CODE = 2


def run(main: Callable[[list[str]], None]) -> None:
    """`app.run`, except that bad input ends with its message on stderr and exit code 2.

    Set --show_traceback to see where an error came from.
    """

    def guarded(argv):
        try:
            main(argv)
        except USER_ERRORS as error:
            if flags.FLAGS.show_traceback:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_CODE)

    app.run(guarded, flags_parser=_parse)


if "show_traceback" not in flags.FLAGS:
    flags.DEFINE_bool("show_traceback", False, "Show the traceback of errors in the input.")


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {explain_flag_error(str(error), _config())}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        # ml_collections raises these for unknown keys, wrong types and missing config files.
        print(f"error: {explain_flag_error(_text(error), _config())}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def _text(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _config() -> ConfigDict | None:
    try:
        return flags.FLAGS["config"].value
    except Exception:  # the flag itself may be what failed
        return None


def explain_flag_error(message: str, config: ConfigDict | None) -> str:
    """Adds the nearest known keys to a message about an unknown `config.KEY`."""
    match = re.search(r"config\.([A-Za-z0-9_.]+)", message)
    if config is None or match is None:
        return message
    wanted = match.group(1)
    known = keys(config)
    if wanted in known:
        return message
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = ", ".join(f"config.{key}" for key in near) if near else "see configs/base.py"
    return f"unknown configuration key config.{wanted}; the nearest are: {hint}."


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys of a config, leaves only."""
    result = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        result += keys(value, f"{name}.") if isinstance(value, ConfigDict) else [name]
    return result
