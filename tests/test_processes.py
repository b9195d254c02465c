"""Several processes as one job, on CPU devices connected by the network.

The processes run `work` below; the tests check the results.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from fsdfm_jax import cli, io, stages
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes, rules
from fsdfm_jax.training import checkpoint
from fsdfm_jax.training import loop as loop_lib

ROOT = pathlib.Path(__file__).parents[1]
ROWS = 16

# -------------------------------------------------------------------------- a stage of one matrix


def toy_stage():
    """A weight for each row and channel, which reveals missing and duplicate rows."""

    def init_params(key, base):
        return {"head": {"kernel": jnp.zeros((ROWS, 3))}}

    def loss(params, frozen, key, batch):
        noise_BD = jax.random.normal(key, (ROWS, 3))
        wrong_BD = params["head"]["kernel"] - batch["x1"].astype(jnp.float32) + 0.1 * noise_BD
        value = jnp.mean(wrong_BD**2 * (1.0 + jnp.arange(ROWS))[:, None])
        return value, {"loss": value, "frozen": jnp.sum(frozen.average["head"]["kernel"])}

    return stages.Stage("toy", None, init_params, loss)


def make_mesh(*sizes, slices=1):
    sizes = dict(zip(rules.AXES, sizes, strict=True))
    return mesh_lib.make_mesh(ConfigDict(sizes | {"slices": slices}))


def toy_batches(rows, start, on_step=lambda step: None):
    for step in itertools.count(start):
        on_step(step)
        batch = np.random.default_rng(step).integers(9, size=(ROWS, 3))
        yield {"x1": batch[rows].astype(np.int32)}


def train_toy(directory, num_steps, sizes=(1, 8, 1), *, on_step=lambda step: None, **values):
    mesh = make_mesh(*sizes)
    rows = mesh_lib.local_rows(mesh, ROWS)
    loop_lib.train(
        toy_stage(),
        loop_lib.Settings(num_steps, ROWS, 1, 3, 0.5, **values),
        name="toy",
        optimizer=optax.adam(0.1),
        batches=functools.partial(toy_batches, rows, on_step=on_step),
        base=None,
        key=jax.random.key(0),
        mesh=mesh,
        directory=directory,
        metadata={},
    )


# ------------------------------------------------------------------------------------ the processes


def work(argv):
    """Run one of the processes; see the tests."""
    _, task, folder, coordinator, process = argv
    processes.initialize(coordinator, 2, int(process))
    folder, second = pathlib.Path(folder), process == "1"
    if task == "together":
        _work_together(folder, second)
    elif task == "stopped":
        stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None
        train_toy(folder, 10_000, on_step=stop if second else lambda step: None)
    elif task == "died":
        die = lambda step: os._exit(7) if step == 8 else None
        train_toy(folder, 10_000, on_step=die if second else lambda step: time.sleep(0.01))
    elif task == "failed":

        def fail(step):
            if step == 8:
                raise OSError("the text is gone")

        train_toy(folder, 10_000, on_step=fail if second else lambda step: None)
    processes.barrier("done")


def _work_together(folder, second):
    # Devices of a process lie together, so that half of the rows are this process's.
    rows = {sizes: mesh_lib.local_rows(make_mesh(*sizes), ROWS) for sizes in SIZES}
    try:
        slices = [d.process_index for d in make_mesh(4, 2, 1, slices=2).devices.flat]
    except ValueError as error:
        slices = str(error)
    facts = {
        "first": processes.is_first(),
        "joined": processes.is_joined(),
        "from_first": processes.from_first(lambda: [3 + second, 5 + second]),
        "rows": list(rows.values()),
        "slices": slices,
    }
    if not second:
        time.sleep(1.0)
        (folder / "late").touch()
    processes.barrier("late")
    facts["waited"] = (folder / "late").exists()
    train_toy(folder / "two", 5)
    train_toy(folder / "of_one", 7)
    io.write_json(folder / f"facts-{int(second)}.json", facts)


SIZES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8))


def start(task, folder):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "JAX_NUM_CPU_DEVICES": "4"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, task, str(folder), coordinator, str(process)],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]


def finish(started, timeout=240):
    """(exit codes, stderr), each read while all processes run."""
    errors = [""] * len(started)

    def read(number, process):
        errors[number] = process.stderr.read()

    readers = [threading.Thread(target=read, args=each) for each in enumerate(started)]
    for reader in readers:
        reader.start()
    codes = []
    deadline = time.monotonic() + timeout
    try:
        for process in started:
            codes.append(process.wait(max(1.0, deadline - time.monotonic())))
    finally:
        for process in started:
            process.kill()
        for reader in readers:
            reader.join()
    return codes, errors


def lines(folder):
    return io.read_jsonl(folder / "metrics.jsonl")


def losses(folder):
    return [line["loss"] for line in lines(folder)]


def saved(folder):
    return checkpoint.restore_part(folder / "checkpoints", ("params",))["params"]["head"]["kernel"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of two processes that trained together."""
    folder = tmp_path_factory.mktemp("together")
    train_toy(folder / "of_one", 3)  # begun by one process
    codes, errors = finish(start("together", folder))
    assert codes == [0, 0], "\n".join(errors)[-3000:]
    return folder


def test_two_processes_find_each_other(together):
    first, second = (json.loads((together / f"facts-{i}.json").read_text()) for i in (0, 1))
    assert (first["first"], second["first"]) == (True, False)
    assert first["joined"]
    assert not processes.is_joined()
    assert first["from_first"] == second["from_first"] == [3, 5]
    assert second["waited"]


def test_each_process_reads_the_rows_of_its_devices(together):
    first, second = (json.loads((together / f"facts-{i}.json").read_text()) for i in (0, 1))
    for sizes, *both in zip(SIZES, first["rows"], second["rows"], strict=True):
        if sizes[2] == 8:  # all of them have all rows
            assert both == [list(range(ROWS))] * 2
        else:
            assert both == [list(range(ROWS // 2)), list(range(ROWS // 2, ROWS))], sizes


def test_devices_without_slices_go_by_process(together):
    facts = json.loads((together / "facts-0.json").read_text())
    assert facts["slices"] == [0] * 4 + [1] * 4


def test_two_processes_train_as_one_does(together, tmp_path):
    train_toy(tmp_path, 5)
    np.testing.assert_allclose(losses(together / "two"), losses(tmp_path), rtol=1e-6)
    np.testing.assert_allclose(saved(together / "two"), saved(tmp_path), rtol=1e-5, atol=1e-6)
    # One process writes: no line is there twice.
    assert [line["step"] for line in lines(together / "two")] == [1, 2, 3, 4, 5]
    assert not [path for path in together.rglob("*") if "tmp" in path.name]


def test_two_processes_go_on_from_one_and_one_from_two(together, tmp_path):
    train_toy(tmp_path, 9)
    np.testing.assert_allclose(losses(together / "of_one"), losses(tmp_path)[:7], rtol=1e-6)
    train_toy(together / "of_one", 9, (2, 2, 2))
    np.testing.assert_allclose(losses(together / "of_one"), losses(tmp_path), rtol=1e-6)
    np.testing.assert_allclose(saved(together / "of_one"), saved(tmp_path), rtol=1e-5, atol=1e-6)
    assert [line["step"] for line in lines(together / "of_one")] == list(range(1, 10))


def test_a_signal_to_one_stops_both_at_one_step(tmp_path):
    codes, errors = finish(start("stopped", tmp_path))
    assert codes == [143, 143], "\n".join(errors)[-3000:]
    found = [re.search(r"stopped by SIGTERM at step (\d+) of 10000", text) for text in errors]
    assert found[0].group() == found[1].group()
    step = int(found[0].group(1))
    # The batch of step 5 is read when the signal comes; the answer is a step or two away.
    assert 4 < step < 10
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step
    train_toy(tmp_path, step + 1)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 2))


@pytest.mark.slow  # the one that is left hears of it after JAX's 100 seconds
@pytest.mark.parametrize("task", ["died", "failed"])
def test_one_that_is_gone_ends_the_other(tmp_path, task):
    began = time.monotonic()
    codes, errors = finish(start(task, tmp_path))
    assert codes[1] == (7 if task == "died" else cli.EXIT_CODE), errors[1][-3000:]
    assert codes[0] != 0, errors[0][-3000:]
    assert time.monotonic() - began < 200
    if task == "failed":
        assert "error: the text is gone" in errors[1]
    # Earlier saves are complete, the current one may not be; the job resumes from them.
    assert checkpoint.latest_step(tmp_path / "checkpoints") in (3, 6)
    train_toy(tmp_path, 9)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 10))


def test_processes_that_cannot_join_are_told_what_to_give():
    with pytest.raises(ValueError, match=r"can't connect.*--coordinator=HOST:PORT"):
        processes.initialize(None, 2, None)
    assert not processes.is_joined()


def test_a_signal_after_the_last_question_is_not_forgotten():
    got, mesh = [], mesh_lib.local_mesh()
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("as always"))
    try:
        with processes.StopRequest(mesh) as stop:
            assert not stop.granted(stop.ask())
            os.kill(os.getpid(), signal.SIGTERM)
        assert got == ["as always"]
        with contextlib.suppress(KeyError), processes.StopRequest(mesh):
            os.kill(os.getpid(), signal.SIGTERM)
            raise KeyError
        assert got == ["as always"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_lone_process_waits_for_nobody():
    processes.barrier("alone")
    processes.leave(3)  # does nothing: an ordinary exit is fine
    assert processes.is_first()


# ------------------------------------------------------------------------------------- the program


@pytest.mark.slow
def test_the_program_in_two_processes_is_that_in_one(tmp_path):
    """All stages and the evaluation, on eight devices of one process and of two."""
    from test_main import STAGES, World

    world = World(tmp_path)
    flags = [*world.flags, "--config.mesh.fsdp=2", "--config.model.num_blocks=2"]
    world.env["JAX_NUM_CPU_DEVICES"] = "8"
    world.env["PYTHON"] = sys.executable
    one, two = tmp_path / "one", tmp_path / "two"
    printed = world.run("main", *flags, f"--workdir={one}")
    command = [str(ROOT / "launch" / "local.sh"), "--processes=2", "--devices=4", "--"]
    done = subprocess.run(
        [*command, *flags, f"--workdir={two}"],
        cwd=tmp_path,
        env=world.env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage in STAGES:
        got, want = (lines(folder / "stages" / stage) for folder in (two, one))
        assert [line["step"] for line in got] == [line["step"] for line in want]
        for mine, theirs in zip(got, want, strict=True):
            for name in ("loss", "grad_norm"):
                np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-4, err_msg=stage)
    rows = [
        [(row["group"], row["steps"]) for row in _results(folder)["rows"]] for folder in (one, two)
    ]
    assert rows[0] == rows[1]
    # The table and the files once, by one process.
    heading = printed.splitlines()[0]
    assert done.stdout.count(heading) == printed.count(heading) == 1
    names = [
        {str(path.relative_to(folder)) for path in (folder / "report").rglob("*")}
        for folder in (one, two)
    ]
    assert names[0] == names[1]
    assert not [path for path in two.rglob("*") if re.search(r"tmp|temp|partial", path.name)]
    second = (two / "logs" / "process-1.log").read_text()
    assert "Report:" not in second


def _results(folder):
    return json.loads((folder / "report" / "results.json").read_text())


if __name__ == "__main__":
    cli.run(work)
