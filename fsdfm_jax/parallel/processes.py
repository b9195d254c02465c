"""Several processes as one job: how they find each other, wait for each other and stop together.

Every process runs the same program on the devices of its host. The working directory is one folder
that all of them see; only the first process writes files there, checkpoints aside, of which each
process writes its part.
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

# Of a program that was asked to end (SIGTERM), as shells count: 128 + 15.
STOPPED = 143

_SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

# Longer than anything that one process does alone, as preparing text or evaluating.
_BARRIER_SECONDS = 30 * 24 * 3600


class Stopped(SystemExit):
    """The job was asked to end and has saved what it had."""

    def __init__(self, message: str):
        super().__init__(STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of a job; to be called before anything asks for a device.

    Args:
      coordinator: "HOST:PORT" of the first process; None where JAX knows the cluster (TPU pods,
        SLURM, Open MPI, GKE).
      num_processes, process_id: how many there are, and which one this is; as above.

    Raises:
      ValueError: if they can't find each other, with JAX's reason.
    """
    # JAX's own notifier would swallow SIGTERM outside of training loops too.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The processes of the job can't be joined ({error}). Where the cluster isn't known to "
            "JAX, give --coordinator=HOST:PORT --num_processes=N --process_id=I; on a lone host "
            "leave --distributed out."
        ) from error


def is_joined() -> bool:
    """Whether this process is one of a job, see `initialize`."""
    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """End this process of a job at once: the others, which can't go on alone, see it gone.

    An ordinary exit waits minutes for them. Nothing in a lone process.
    """
    if is_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this process writes the files that are written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process of the job is here, be it days; nothing in a lone process."""
    if jax.process_count() == 1:
        return
    # JAX has no public wait on hosts: `sync_global_devices` waits on the devices, whose
    # collectives give up after seconds (CPU) or block the accelerator. Orbax has one.
    from orbax.checkpoint import v1 as ocp

    wait = ocp.multihost.sync_global_processes
    asyncio.run(wait(name, operation_id=__name__, timeout=_BARRIER_SECONDS))


def everyone_says(text: str) -> list[str]:
    """The `text` of each process, cut to 2000 bytes; all of them call."""
    if jax.process_count() == 1:
        return [text]
    said = np.zeros(2000, np.uint8)
    data = text.encode()[: said.size]
    said[: len(data)] = np.frombuffer(data, np.uint8)
    rows = _everyones(said)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def together(action: Callable[[], T], *kinds: type[Exception]) -> T:
    """`action()` in every process; where it raises in one, all of them raise.

    Args:
      action: what each process does alone.
      kinds: what the others raise as the kind it is, the mildest first; else they raise OSError.
    """
    value, error, rank = None, None, ""
    try:
        value = action()
    except jax.errors.JaxRuntimeError:  # another process is gone: nobody is there to be told
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
    """The integers (int32) that `action()` gives in the first process, in all of them.

    What decides how all go on is looked up by one: a folder that several hosts share need not look
    the same to all at one moment. Where it raises, all raise: OSError in the other processes.
    """
    values = together(lambda: list(action()) if is_first() else [])
    if jax.process_count() > 1:
        count = _everyones(np.int32(len(values)))[0]
        values = np.asarray(values if is_first() else np.zeros(count), np.int32)
        values = _everyones(values)[0] if count else []
    return [int(value) for value in values]


def _everyones(row: np.ndarray) -> np.ndarray:
    """The arrays [..] of all processes [processes, ..], of one shape and type in each.

    Unlike `multihost_utils.process_allgather` it waits for every device of this process, not for
    its first: who ends while a collective is on its way leaves the others waiting for ever.
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
    """SIGTERM or Ctrl-C as a wish that a loop grants between two steps; a second ends at once.

        with StopRequest(mesh) as request:
            for ...:
                agreed = request.ask()        # a device scalar, not waited for
                ...
                if request.granted(agreed):   # a step later, the same in all processes
                    save; raise Stopped

    Outside of such a loop both end a program as they always do.
    """

    def __init__(self, mesh: Mesh):
        self._asked = 0  # the signal that asked for it
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
        except ValueError:  # not the main thread: whoever runs us handles signals
            return self
        # Python calls a handler between two instructions of the main thread, which may be waiting
        # for a device that a lost host keeps busy. The number of a signal is written at once.
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
            # It came after the last `ask`: all is saved, what follows need not begin.
            signal.raise_signal(self._asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = number

    @property
    def name(self) -> str:
        """What asked for it, for messages."""
        return _SIGNALS.get(self._asked, _SIGNALS[signal.SIGTERM])

    def ask(self) -> bool | jax.Array:
        """Whether any process was told to stop; over several processes computed on the devices."""
        if jax.process_count() == 1:
            return bool(self._asked)
        # What each process knows, in the places of its devices; the others' aren't looked at.
        return self._any(self._place(np.full(self._mesh.size, bool(self._asked), np.int32)))

    def granted(self, agreed: bool | jax.Array) -> bool:
        """The answer to an `ask`, waited for on all devices, see `_everyones`."""
        return bool(jax.block_until_ready(agreed))


def _listen(receiver: int) -> None:
    """Answer the signals whose numbers come out of a pipe, until it is closed."""
    asked = 0
    while numbers := os.read(receiver, 64):
        for name in (_SIGNALS[number] for number in numbers if number in _SIGNALS):
            asked += 1
            if asked == 1:
                # Without a lock: the signal may have come while a line was being logged.
                said = f"{name}: saves after this step, then ends; again to end at once.\n"
                os.write(2, said.encode())
            else:
                # No clean-up: the one who asks twice wants it gone, and a kill is survived.
                os.write(2, f"Second {name}: ends at once.\n".encode())
                os._exit(STOPPED)
    os.close(receiver)
