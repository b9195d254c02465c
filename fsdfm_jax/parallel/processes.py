"""Multi-process jobs: joining, waiting for each other and stopping together.

Every process runs the same program on the devices of its host. The working directory is shared.
Only the first process writes files there, except for checkpoints, of which each process writes its
part.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")

# Exit code of a program that was stopped by SIGTERM: 128 + 15, as in a shell.
STOPPED = 143

_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

# Longer than any work of a single process, such as preparing text or evaluating.
_BARRIER_SECONDS = 30 * 24 * 3600


class Stopped(SystemExit):
    """The job received a request to stop and has saved its state."""

    def __init__(self, message: str):
        super().__init__(STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of a job. Call this before using any device.

    Args:
      coordinator: "HOST:PORT" of the first process; None if JAX detects the cluster (TPU pods,
        SLURM, Open MPI, GKE).
      num_processes, process_id: their number, and the index of this one; None as above.

    Raises:
      ValueError: if they can't connect, with JAX's reason.
    """
    # JAX's own notifier would also swallow SIGTERM outside training loops.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The processes of the job can't connect ({error}). If JAX doesn't detect the cluster, "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=I; on a single host, "
            "omit --distributed."
        ) from error


def is_joined() -> bool:
    """Return whether this process has joined a job, see `initialize`."""
    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """Exit immediately in a multi-process job, so that the other processes notice.

    A normal exit would wait minutes for them. Does nothing in a single process.
    """
    if is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_first() -> bool:
    """Return whether this is the process that writes shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait, for days if needed, until every process of the job gets here."""
    if jax.process_count() == 1:
        return
    # JAX has no public barrier for hosts: `sync_global_devices` waits on devices, whose
    # collectives time out after seconds (CPU) or block the accelerator. Orbax has one.
    from orbax.checkpoint import v1 as ocp

    wait = ocp.multihost.sync_global_processes
    asyncio.run(wait(name, operation_id=__name__, timeout=_BARRIER_SECONDS))


def everyone_says(text: str) -> list[str]:
    """Gather the `text` of each process, truncated to 2000 bytes; all processes must call."""
    if jax.process_count() == 1:
        return [text]
    said = np.zeros(2000, np.uint8)
    data = text.encode()[: said.size]
    said[: len(data)] = np.frombuffer(data, np.uint8)
    rows = _everyones(said)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def together(action: Callable[[], T], *kinds: type[Exception]) -> T:
    """Run `action()` in every process; if it raises in one, raise in all.

    Args:
      action: must not communicate with other processes.
      kinds: exception types that the other processes raise as such, mildest first; for any other
        type they raise OSError.
    """
    value, error, rank = None, None, ""
    try:
        value = action()
    except jax.errors.JaxRuntimeError:  # another process is gone: no communication possible
        raise
    except Exception as raised:
        error = raised
        ranks = [i for i, kind in enumerate(kinds) if isinstance(error, kind)]
        rank = str(ranks[0] if ranks else len(kinds))
    said = everyone_says(f"{rank}{error}" if error else "")
    worst = max(text[:1] for text in said)
    if error is not None and rank == worst:
        raise error
    for process, text in enumerate(said):
        if worst and text.startswith(worst):
            raise (*kinds, OSError)[int(worst)](f"process {process}: {text[1:]}")
    return value


def from_first(action: Callable[[], Iterable[int]]) -> list[int]:
    """Return the int32 values of the first process's `action()` in all processes.

    Decisions are made by one process because hosts may see different states of a shared folder at
    the same moment. If `action` raises, all processes raise, the others OSError.
    """
    values = together(lambda: list(action()) if is_first() else [])
    if jax.process_count() > 1:
        count = _everyones(np.int32(len(values)))[0]
        values = np.asarray(values if is_first() else np.zeros(count), np.int32)
        values = _everyones(values)[0] if count else []
    return [int(value) for value in values]


def _everyones(row: np.ndarray) -> np.ndarray:
    """Gather an array [..] of equal shape and dtype from each process, [processes, ..].

    Unlike `multihost_utils.process_allgather`, it waits for every device of this process, not just
    the first: exiting during a collective leaves the others waiting for ever.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.reshape(devices, (jax.process_count(), -1)), ("process", "device"))
    shape = (jax.process_count(), *row.shape)
    spread = NamedSharding(mesh, P("process"))
    rows = jax.make_array_from_process_local_data(spread, row[None], shape)
    everywhere = jax.jit(_same, out_shardings=NamedSharding(mesh, P()))(rows)
    return np.asarray(jax.block_until_ready(everywhere).addressable_data(0))


def _same(rows: jax.Array) -> jax.Array:
    return rows


class StopRequest:
    """Turns SIGTERM or Ctrl-C into a stop between two steps; a second signal exits immediately.

        with StopRequest(mesh) as request:
            for ...:
                agreed = request.ask()        # a device scalar, not waited for
                ...
                if request.granted(agreed):   # a step later, the same in all processes
                    save; raise Stopped

    Outside such a loop both signals have their usual effect.
    """

    def __init__(self, mesh: Mesh):
        self._asked = 0  # the signal received, if any
        self._undo = lambda: None
        self._mesh = mesh
        spread = NamedSharding(mesh, P(mesh.axis_names))
        self._place = lambda flags: jax.make_array_from_callback(
            (mesh.size,), spread, lambda index: flags[index]
        )
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def __enter__(self) -> "StopRequest":
        try:
            handlers = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        except ValueError:  # not the main thread: the caller handles signals
            return self
        # Python runs a handler between two instructions of the main thread, which may be blocked on
        # a device that waits for a lost host. The wakeup fd gets the signal number immediately.
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        wakeup = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        listener = threading.Thread(target=_listen, args=(receiver,), daemon=True)
        listener.start()

        def undo():
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.close(sender)
            listener.join()

        self._undo = undo
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        self._undo()
        if self._asked and exc_type is None:
            # It came after the last `ask`: everything is saved, so don't start anything else.
            signal.raise_signal(self._asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = number

    @property
    def name(self) -> str:
        """Name of the signal, for messages."""
        return _SIGNALS.get(self._asked, _SIGNALS[signal.SIGTERM])

    def ask(self) -> bool | jax.Array:
        """Return whether any process got a signal; several processes compute it on devices."""
        if jax.process_count() == 1:
            return bool(self._asked)
        # Each process fills in the entries of its own devices; the other entries are ignored.
        return self._any(self._place(np.full(self._mesh.size, bool(self._asked), np.int32)))

    def granted(self, agreed: bool | jax.Array) -> bool:
        """Wait for the result of an `ask` on all devices, see `_everyones`."""
        return bool(jax.block_until_ready(agreed))


def _listen(receiver: int) -> None:
    """Respond to signal numbers from a pipe until it is closed."""
    asked = 0
    while numbers := os.read(receiver, 64):
        for name in (_SIGNALS[number] for number in numbers if number in _SIGNALS):
            asked += 1
            if asked == 1:
                # os.write takes no lock: the signal may have interrupted logging.
                said = f"{name}: saving after this step, then exiting; repeat to exit at once.\n"
                os.write(2, said.encode())
            else:
                # No clean-up: a second signal means now, and training survives a kill.
                os.write(2, f"Second {name}: exiting at once.\n".encode())
                os._exit(STOPPED)
    os.close(receiver)
