"""One writer per working directory: rejected writers and stale locks."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from fsdfm_jax.training import lock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_WATCH", 0.4)


def _left(folder, **changes):
    folder.mkdir(exist_ok=True)
    owner = lock._owner() | {"since": time.time() - 600} | changes
    (folder / lock.NAME).write_text(json.dumps(owner))


def _take(folder):
    with lock.only_writer(folder):
        return json.loads((folder / lock.NAME).read_text())


def test_the_second_job_is_refused_with_host_process_and_age(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(ValueError, match=rf"process {os.getpid()} on .*, for 0 minutes")
    with lock.only_writer(folder), refused:
        _take(folder)
    assert list(folder.iterdir()) == []
    assert _take(folder)["pid"] == os.getpid()


def test_a_job_of_this_machine_that_ended_leaves_no_lock(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for left in (
        {"pid": ended.pid},
        {"began": "1"},  # its number belongs to another process now
        {"pid": 2**22 + 7},
    ):
        _left(tmp_path / "run", **left)
        began = time.monotonic()
        assert _take(tmp_path / "run")["pid"] == os.getpid()
        assert time.monotonic() - began < 0.3  # at once
    assert list((tmp_path / "run").iterdir()) == []


def test_a_zombie_is_no_writer(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # ended, and nobody has asked how
    _left(tmp_path / "run", pid=ended.pid, began="7")
    assert lock._start_of(ended.pid) == ""
    assert _take(tmp_path / "run")["pid"] == os.getpid()
    ended.wait()


def test_a_lock_of_another_machine_is_watched(tmp_path):
    folder = tmp_path / "run"
    _left(folder, machine="another", host="elsewhere", pid=12)
    assert _take(folder)["pid"] == os.getpid()  # nobody touches it
    _left(folder, machine="another", host="elsewhere", pid=12)
    ended = threading.Event()
    beating = threading.Thread(target=lock._beat, args=(folder / lock.NAME, ended))
    beating.start()
    try:
        with pytest.raises(ValueError, match="process 12 on elsewhere, for 10 minutes"):
            _take(folder)
    finally:
        ended.set()
        beating.join()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": "x"}', "\0"])
def test_a_damaged_lock_is_left_over(tmp_path, content):
    (tmp_path / lock.NAME).write_text(content)
    assert _take(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_takes_over(tmp_path):
    _left(tmp_path, began="1")
    inside, most, refused = [], [], []
    start = threading.Barrier(8)

    def job():
        start.wait()
        try:
            with lock.only_writer(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.1)
                inside.pop()
        except ValueError:
            refused.append(1)

    threads = [threading.Thread(target=job) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 8
