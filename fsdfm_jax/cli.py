"""What the programs share: flags that explain themselves, and errors of one line."""

import difflib
import errno
import logging
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fsdfm_jax.parallel import processes

# What a user can mend; anything else is a bug of ours and keeps its traceback.
USER_ERRORS = (ValueError, FloatingPointError, OSError)

EXIT_CODE = 2
# Of what may be gone when the same command is run again, as launchers do.
TRANSIENT_CODE = 1
_TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
}


# Programs by their names on the command line, `fsdfm NAME`.
COMMANDS = {
    "train": ("fsdfm_jax.main", "train the stages of a config, then evaluate"),
    "generate": ("fsdfm_jax.generate", "text from any model"),
    "evaluate": ("fsdfm_jax.evaluate", "quality against steps, with intervals"),
    "sweep": ("launch.sweep", "every combination of steps, temperatures, seeds, .."),
    "convert": ("fsdfm_jax.convert", "models from one format to another"),
    "prepare": ("launch.prepare_data", "text into blocks of tokens"),
    "aot": ("launch.aot_compile", "compile for a pod you don't have"),
}


def main() -> None:
    """`fsdfm COMMAND ..`, the same as `python -m` its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        lines = [f"  {command:10}{what}" for command, (_, what) in COMMANDS.items()]
        usage = "\n".join(["usage: fsdfm COMMAND [FLAGS]   (fsdfm COMMAND --help)", "", *lines])
        if name in ("", "-h", "--help", "help"):
            print(usage)
            sys.exit(0)
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(COMMANDS)}."
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        sys.exit(EXIT_CODE)
    del sys.argv[1]
    add_shared_to_path()
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


# ------------------------------------------------------------------------------- shared folders
def shared(name: str) -> pathlib.Path:
    """The folder "configs" or "launch": inside an installed package, beside it in a checkout."""
    package = pathlib.Path(__file__).parent
    inside = package / "share" / name
    return inside if inside.is_dir() else package.parent / name


def add_shared_to_path() -> None:
    """Lets `configs` and `launch` be imported; a folder of that name at hand comes first."""
    place = str(shared("configs").parent)
    if place not in sys.path:
        sys.path.append(place)


def find_config(spec: str) -> str:
    """The path of a config file that is given by path or by name.

    Args:
      spec: "my/config.py:ARG"; "configs/tiny.py:smoke", "tiny.py:smoke" or "tiny:smoke" are found
        in the installed package too.
    """
    path, colon, argument = spec.partition(":")
    if not pathlib.Path(path).is_file():
        found = shared("configs") / pathlib.Path(path).with_suffix(".py").name
        if found.is_file() and pathlib.Path(path).parent.name in ("", "configs"):
            path = str(found)
    return f"{path}{colon}{argument}"


def base_config() -> ConfigDict:
    """configs/base.py: every key with its default."""
    return runpy.run_path(str(shared("configs") / "base.py"))["get_config"]()


def update(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets keys of a config, section by section.

    Raises:
      ValueError: for a key that isn't declared, with the nearest ones.
    """
    known = keys(config)
    for key in keys(ConfigDict(values)):
        if key not in known:
            raise ValueError(unknown_key(key, known))
    config.update(values)


# --------------------------------------------------------------------------------------- programs
def run(main: Callable[[list[str]], None]) -> None:
    """`app.run`, except that bad input ends with its message on stderr and exit code 2.

    So does an OSError, but with code 1 where it is one that passes, as of a network file system.
    Set --show_traceback to see where an error came from.
    """

    def guarded(argv):
        try:
            main(argv)
        except processes.Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise
        except USER_ERRORS as error:
            if flags.FLAGS.show_traceback:
                traceback.print_exc()
            print(f"error: {error}", file=sys.stderr)
            passes = getattr(error, "errno", None) in _TRANSIENT
            code = TRANSIENT_CODE if passes else EXIT_CODE
            processes.leave(code)
            sys.exit(code)
        except Exception:
            if processes.is_joined():
                traceback.print_exc()
                processes.leave(1)
            raise

    add_shared_to_path()
    # A line for each accelerator that isn't there is noise to everyone else.
    logging.getLogger("jax").setLevel(logging.WARNING)
    app.run(guarded, flags_parser=_parse)


def config_given(argv: list[str]) -> bool:
    """Whether a command line names a configuration file."""
    return any(re.match(r"--?config(=|$)", part) for part in argv)


if "show_traceback" not in flags.FLAGS:
    flags.DEFINE_bool("show_traceback", False, "Show the traceback of errors in the input.")


def _parse(argv: list[str]) -> list[str]:
    argv = [
        f"--config={find_config(part.partition('=')[2])}" if re.match(r"--?config=", part) else part
        for part in argv
    ]
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            flags.FLAGS.config.keys()  # a file that can't be read only shows at the first access
        return rest
    except Exception as error:  # ml_collections raises all kinds for keys, types and files
        print(f"error: {_explain(error, argv)}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for an error in the flags; names the nearest keys where a key is unknown."""
    overrides = re.findall(r"^--?(?:no)?config\.([\w.]+)", "\n".join(argv), re.M)
    config = _config_without_overrides(argv)
    if config is not None:
        known = keys(config)
        groups = {key.rsplit(".", 1)[0] for key in known if "." in key}
        for wanted in overrides:
            if wanted not in known and wanted not in groups:
                return unknown_key(wanted, known)
    text = " ".join(str(error).split())
    return text.rsplit("Error: ", 1)[-1] if "Traceback" in text else text


def _config_without_overrides(argv: list[str]) -> ConfigDict | None:
    """The config that argv names, None if it names none that can be read."""
    plain = [part for part in argv if re.match(r"--?config=", part)]
    try:
        alone = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=plain)
        alone([argv[0], *plain])
        alone.config.keys()
    except Exception:  # then the file is what is wrong, and the first error says so
        return None
    return alone.config


def unknown_key(wanted: str, known: list[str]) -> str:
    """The message for an override of a key that no config declares."""
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = "the nearest are " + ", ".join(f"config.{key}" for key in near) + "; " if near else ""
    return f"unknown configuration key config.{wanted}: {hint}see configs/base.py for all of them."


def keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys of a config, leaves only."""
    result = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        result += keys(value, f"{name}.") if isinstance(value, ConfigDict) else [name]
    return result
