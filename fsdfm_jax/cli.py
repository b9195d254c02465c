"""Common parts of the programs: command line, config files, one-line errors."""

import difflib
import errno
import functools
import logging
import os
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fsdfm_jax import completion, schema
from fsdfm_jax.parallel import processes

# Errors that a user can fix; anything else is a bug and keeps its traceback.
USER_ERRORS = (ValueError, FloatingPointError, OSError)

EXIT_CODE = 2
# For errors that may disappear when the same command is run again, as launchers do.
TRANSIENT_CODE = 1
_TRANSIENT = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET),
}


# Programs by command-line name, `fsdfm NAME`.
COMMANDS = {
    "train": ("fsdfm_jax.main", "train the stages of a config, then evaluate"),
    "generate": ("fsdfm_jax.generate", "generate text with any model"),
    "evaluate": ("fsdfm_jax.evaluate", "measure quality against steps, with intervals"),
    "sweep": ("launch.sweep", "evaluate all combinations of steps, temperatures, seeds, .."),
    "convert": ("fsdfm_jax.convert", "convert models between formats"),
    "prepare": ("launch.prepare_data", "prepare text as blocks of tokens"),
    "aot": ("launch.aot_compile", "compile for a pod you don't have"),
}


_COMPLETION = "completion"


def main() -> None:
    """Run `fsdfm COMMAND ..`, the same as `python -m` with its module."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name == _COMPLETION:
        _print_completion(sys.argv[2:])
        return
    if name not in COMMANDS:
        lines = [f"  {command:11}{what}" for command, (_, what) in COMMANDS.items()]
        lines.append(f"  {_COMPLETION:11}a script of bash or zsh that completes all this")
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


def _print_completion(arguments: list[str]) -> None:
    configs = sorted(path.name for path in shared("configs").glob("[a-z]*.py"))
    try:
        print(completion.script(" ".join(arguments), COMMANDS, configs), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)


# ------------------------------------------------------------------------------- shared folders
def shared(name: str) -> pathlib.Path:
    """Return the folder "configs" or "launch", in an installed package or in a checkout."""
    package = pathlib.Path(__file__).parent
    inside = package / "share" / name
    return inside if inside.is_dir() else package.parent / name


def add_shared_to_path() -> None:
    """Make `configs` and `launch` importable; folders with these names in sys.path come first."""
    place = str(shared("configs").parent)
    if place not in sys.path:
        sys.path.append(place)


def find_config(spec: str) -> str:
    """Resolve a config file given by path or name.

    Args:
      spec: "my/config.py:ARG"; "configs/tiny.py:smoke", "tiny.py:smoke" or "tiny:smoke" are also
        found in the installed package.
    """
    path, colon, argument = spec.partition(":")
    if not pathlib.Path(path).is_file():
        found = shared("configs") / pathlib.Path(path).with_suffix(".py").name
        if found.is_file() and pathlib.Path(path).parent.name in ("", "configs"):
            path = str(found)
    return f"{path}{colon}{argument}"


def base_config() -> ConfigDict:
    """Return the config of configs/base.py: every key with its default."""
    return runpy.run_path(str(shared("configs") / "base.py"))["get_config"]()


def update(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Set keys of a config, section by section.

    Raises:
      ValueError: for an unknown key; suggests the nearest known ones.
    """
    known = schema.keys(config)
    for key in schema.keys(ConfigDict(values)):
        if key not in known:
            raise ValueError(schema.unknown_key(key, known))
    config.update(values)


# --------------------------------------------------------------------------------------- programs
def run(
    main: Callable[[list[str]], None],
    *,
    kept: str = "nothing was written; run the same command again",
    default_config: str | os.PathLike | None = None,
) -> None:
    """As `app.run`, but report errors that a user can fix in one line and exit with code 2.

    These are bad flags, configurations or files, wrong usage, insufficient memory, and OSErrors;
    transient ones, such as those of a network file system, exit with code 1. Ctrl-C behaves like
    SIGTERM. --show_traceback shows the traceback of an error.

    Args:
      main: the program; a --config flag is checked first by `schema.check`.
      kept: for the message of a stopped program: what is kept, and how to resume.
      default_config: default file for --config.
    """

    def guarded(argv):
        try:
            main(argv)
        except processes.Stopped as stopped:
            print(stopped, file=sys.stderr)
            raise
        except KeyboardInterrupt:
            _leave(f"stopped by Ctrl-C: {kept}.", processes.STOPPED)
        except (app.UsageError, *USER_ERRORS) as error:
            if flags.FLAGS.show_traceback:
                traceback.print_exc()
            passes = getattr(error, "errno", None) in _TRANSIENT
            _leave(f"error: {error}", TRANSIENT_CODE if passes else EXIT_CODE)
        except Exception as error:
            if _is_lack_of_memory(error) and not flags.FLAGS.show_traceback:
                _leave(f"error: {_out_of_memory(error)}", EXIT_CODE)
            if processes.is_joined():
                traceback.print_exc()
                processes.leave(1)
            raise

    add_shared_to_path()
    # JAX logs a line for each missing accelerator; hide them.
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        app.run(guarded, flags_parser=functools.partial(_parse, default_config=default_config))
    except KeyboardInterrupt:  # before the program started
        _leave("stopped by Ctrl-C before the start.", processes.STOPPED)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    processes.leave(code)
    sys.exit(code)


def _is_lack_of_memory(error: Exception) -> bool:
    # JAX raises a RuntimeError.
    told = isinstance(error, RuntimeError) and re.search(
        "RESOURCE_EXHAUSTED|Out of memory", str(error)
    )
    return isinstance(error, MemoryError) or bool(told)


def _out_of_memory(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["no details"]
    return (
        f"out of memory ({said[0][:200]}); use a smaller network, batch, or block, or more devices "
        "(config.mesh.fsdp)"
    )


def define_config(description: str) -> flags.FlagHolder:
    """Define the --config flag of a program."""
    try:
        return config_flags.DEFINE_config_file("config", None, description)
    except flags.Error as error:  # it reads flag files immediately
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def config_was_given() -> bool:
    """Return whether the parsed command line has --config, even with the default file."""
    return _Parsed.names_config


class _Parsed:
    """Facts about the parsed command line that the flags don't record."""

    names_config = False


if "show_traceback" not in flags.FLAGS:
    flags.DEFINE_bool("show_traceback", False, "Show the traceback of errors in the input.")


def _parse(argv: list[str], default_config: str | os.PathLike | None = None) -> list[str]:
    """Parse the flags; return the program's name and the other arguments."""
    try:
        # Overrides of the configuration become flags only once it is read, so first merge flag
        # files into one command line.
        argv = flags.FLAGS.read_flags_from_files(_with_help(argv), force_gnu=False)
        _Parsed.names_config = any(re.match(r"--?config(=|$)", part) for part in argv)
        if default_config is not None and not _Parsed.names_config:
            argv = [argv[0], f"--config={default_config}", *argv[1:]]
        sys.argv[:] = argv = _with_configs(argv)
        rest = flags.FLAGS(argv)
        _check_not_empty()
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            flags.FLAGS.config.keys()  # an unreadable file raises only on first access
            schema.check(flags.FLAGS.config)
        return rest
    except Exception as error:  # ml_collections raises many types for keys, types and files
        _leave(f"error: {_explain(error, argv)}", EXIT_CODE)


def _with_help(argv: list[str]) -> list[str]:
    return [argv[0], *("--help" if part == "-h" else part for part in argv[1:])]


def _with_configs(argv: list[str]) -> list[str]:
    """Replace config names by paths, also in the form "--config NAME"."""
    result: list[str] = []
    for part in argv:
        if result and re.fullmatch(r"--?config", result[-1]):
            result[-1:] = [f"--config={find_config(part)}"]
        elif re.match(r"--?config=", part):
            result.append(f"--config={find_config(part.partition('=')[2])}")
        else:
            result.append(part)
    return result


# Flags with paths or addresses, which are empty if a shell variable isn't set.
_PLACES = (
    *("workdir", "checkpoint", "output", "batch_file", "data", "directory"),
    *("topology", "cases", "markdown", "coordinator"),
)


def _check_not_empty() -> None:
    for name in _PLACES:
        given = name in flags.FLAGS and flags.FLAGS[name].present
        if given and not str(flags.FLAGS[name].value or "").strip():
            raise ValueError(
                f"--{name} is empty (an unset shell variable?); give a value, or omit the flag"
            )


def _explain(error: Exception, argv: list[str]) -> str:
    """Explain an error in the flags in one line; suggest the nearest keys for an unknown one."""
    overrides = re.findall(r"^--?(?:no)?config\.([\w.]+)", "\n".join(argv), re.M)
    config = _config_without_overrides(argv)
    if config is not None:
        known = schema.keys(config)
        groups = {key.rsplit(".", 1)[0] for key in known if "." in key}
        for wanted in overrides:
            if wanted not in known and wanted not in groups:
                return schema.unknown_key(wanted, known)
    text = " ".join(str(error).split())
    return text.rsplit("Error: ", 1)[-1] if "Traceback" in text else text


def _config_without_overrides(argv: list[str]) -> ConfigDict | None:
    """Return the config of argv without overrides; None if it can't be read."""
    plain = [part for part in argv if re.match(r"--?config=", part)]
    try:
        alone = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=alone, sys_argv=plain)
        alone([argv[0], *plain])
        alone.config.keys()
    except Exception:  # the file is bad, which the first error reports
        return None
    return alone.config
