"""What the programs share: flags that explain themselves, and errors of one line."""

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


_COMPLETION = "completion"


def main() -> None:
    """`fsdfm COMMAND ..`, the same as `python -m` its module."""
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
    """`app.run`, except that what a user can mend ends with one line on stderr and exit code 2.

    That is: a bad flag, configuration or file, wrong usage, too little memory, and an OSError,
    though with code 1 where it is one that passes, as of a network file system. Ctrl-C ends as
    SIGTERM does. Set --show_traceback to see where an error came from.

    Args:
      main: the program; its flag --config, if it has one, is checked before by `schema.check`.
      kept: what a program that is stopped has kept and how to go on, for the line that says so.
      default_config: file of --config where the command line names none.
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
    # A line for each accelerator that isn't there is noise to everyone else.
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        app.run(guarded, flags_parser=functools.partial(_parse, default_config=default_config))
    except KeyboardInterrupt:  # before the program itself began
        _leave("stopped by Ctrl-C: nothing was begun.", processes.STOPPED)


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    processes.leave(code)
    sys.exit(code)


def _is_lack_of_memory(error: Exception) -> bool:
    # JAX says it in a RuntimeError.
    told = isinstance(error, RuntimeError) and re.search(
        "RESOURCE_EXHAUSTED|Out of memory", str(error)
    )
    return isinstance(error, MemoryError) or bool(told)


def _out_of_memory(error: Exception) -> str:
    said = str(error).strip().splitlines() or ["no more is given"]
    return (
        f"out of memory ({said[0][:200]}); use a smaller network, batch, or block, or more devices "
        "(config.mesh.fsdp)"
    )


def define_config(description: str) -> flags.FlagHolder:
    """The flag --config of a program."""
    try:
        return config_flags.DEFINE_config_file("config", None, description)
    except flags.Error as error:  # it looks into flag files at once
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_CODE)


def config_was_given() -> bool:
    """Whether the parsed command line named a configuration file, be it the default one."""
    return _Parsed.names_config


class _Parsed:
    """What the flags don't tell of the command line that they were parsed from."""

    names_config = False


if "show_traceback" not in flags.FLAGS:
    flags.DEFINE_bool("show_traceback", False, "Show the traceback of errors in the input.")


def _parse(argv: list[str], default_config: str | os.PathLike | None = None) -> list[str]:
    """The arguments that aren't flags, after the program's name."""
    try:
        # Overrides of the configuration are flags that only exist once it is read, wherever they
        # are: all that follows sees one command line.
        argv = flags.FLAGS.read_flags_from_files(_with_help(argv), force_gnu=False)
        _Parsed.names_config = any(re.match(r"--?config(=|$)", part) for part in argv)
        if default_config is not None and not _Parsed.names_config:
            argv = [argv[0], f"--config={default_config}", *argv[1:]]
        sys.argv[:] = argv = _with_configs(argv)
        rest = flags.FLAGS(argv)
        _check_not_empty()
        if "config" in flags.FLAGS and flags.FLAGS["config"].value is not None:
            flags.FLAGS.config.keys()  # a file that can't be read only shows at the first access
            schema.check(flags.FLAGS.config)
        return rest
    except Exception as error:  # ml_collections raises all kinds for keys, types and files
        _leave(f"error: {_explain(error, argv)}", EXIT_CODE)


def _with_help(argv: list[str]) -> list[str]:
    return [argv[0], *("--help" if part == "-h" else part for part in argv[1:])]


def _with_configs(argv: list[str]) -> list[str]:
    """Names of config files as paths, also where they are an argument of their own."""
    result: list[str] = []
    for part in argv:
        if result and re.fullmatch(r"--?config", result[-1]):
            result[-1:] = [f"--config={find_config(part)}"]
        elif re.match(r"--?config=", part):
            result.append(f"--config={find_config(part.partition('=')[2])}")
        else:
            result.append(part)
    return result


# Flags that name a place: empty where a variable of the shell isn't set.
_PLACES = (
    *("workdir", "checkpoint", "output", "batch_file", "data", "directory"),
    *("topology", "cases", "markdown", "coordinator"),
)


def _check_not_empty() -> None:
    for name in _PLACES:
        given = name in flags.FLAGS and flags.FLAGS[name].present
        if given and not str(flags.FLAGS[name].value or "").strip():
            raise ValueError(
                f"--{name} is empty (a variable of the shell that isn't set?); give a value, or "
                "leave the flag out"
            )


def _explain(error: Exception, argv: list[str]) -> str:
    """One line for an error in the flags; names the nearest keys where a key is unknown."""
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
