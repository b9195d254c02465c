"""Lock a working directory: a second job fails while the first one is running.

The lock is a file with the host, process id and start time of its owner, touched every few seconds.
On the same machine, a stale lock is detected immediately. For a lock from another machine, this
process watches for a touch for `_WATCH` seconds.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from fsdfm_jax import io

NAME = "writer.json"
_BEAT = 5.0  # seconds between touches
_WATCH = 4 * _BEAT  # a lock without a touch for this long is stale


@contextlib.contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a folder; make the folder if needed.

    Raises:
      ValueError: if another job holds the lock; names host, process and age.
      OSError: if the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, ours = folder / NAME, _owner()
    with _in_turn(folder):
        while not _create(path, ours):
            _remove_if_stale(path)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == ours:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_turn(folder: pathlib.Path) -> Iterator[None]:
    """Let the jobs of a machine look at the lock one after another.

    Otherwise one could replace a stale lock between another's reading and removing it. Without
    `flock` on the file system there are no turns, and `_remove_if_stale` does what it can.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _owner() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "began": _start_of(os.getpid()),
        "since": time.time(),
    }


def _machine() -> str:
    """Scope in which process ids are unique: this boot of this machine, and this container."""
    try:
        boot = pathlib.Path("/", "proc", "sys", "kernel", "random", "boot_id").read_text().strip()
        return f"{boot} {os.readlink(pathlib.Path('/', 'proc', 'self', 'ns', 'pid'))}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """Start time of a process in ticks since boot, because process ids are reused.

    Returns "" if it has ended, "unknown" if the system doesn't report it.
    """
    try:
        fields = pathlib.Path("/", "proc", str(pid), "stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "unknown"


def _create(path: pathlib.Path, owner: dict[str, Any]) -> bool:
    """Create the lock atomically; return False if it exists."""
    own = path.with_name(f".{NAME}.{owner['pid']}.{socket.gethostname()}.tmp")
    io.write_json(own, owner)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(own.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _beat(path: pathlib.Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = io.read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else {}


def _remove_if_stale(path: pathlib.Path) -> None:
    owner = _read(path)
    if owner is not None and _runs(path, owner):
        age = max(time.time() - float(owner.get("since") or 0), 0) / 60
        raise ValueError(
            f"Another job is writing to {path.parent}: process {owner.get('pid')} on "
            f"{owner.get('host')}, for {age:.0f} minutes. Stop it, or choose another --workdir."
        )
    # Two jobs may get here at once: the second must not remove the first one's new lock.
    aside = path.with_name(f".{NAME}.{os.getpid()}.{socket.gethostname()}.old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != owner:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _runs(path: pathlib.Path, owner: dict[str, Any]) -> bool:
    if owner.get("machine") == _machine():
        return owner.get("began") == _start_of(int(owner.get("pid", 0))) != ""
    # On another machine: watch the lock.
    try:
        before = path.stat().st_mtime_ns
        if time.time() - path.stat().st_mtime > 3600:  # more than any clock skew
            return False
        end = time.monotonic() + _WATCH
        while time.monotonic() < end:
            time.sleep(_BEAT / 5)
            if path.stat().st_mtime_ns != before:
                return True
    except FileNotFoundError:
        pass
    return False
