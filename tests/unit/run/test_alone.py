"""A run is one process's at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from stare_megatron.errors import UserError
from stare_megatron.run import alone as module
from stare_megatron.run.alone import alone

HOLDS = """
import sys, time
from pathlib import Path
from stare_megatron.run.alone import alone
with alone(Path(sys.argv[1]), print):
    print("has it", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "mine"


def refused(folder):
    with pytest.raises(UserError) as e, alone(folder, pytest.fail):
        pytest.fail("two have it")
    return str(e.value)


def test_a_second_process_is_refused_until_the_first_ends_however_it_does(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "has it\n"
        message = refused(folder)
        assert f"run.name = 'mine': process {holder.pid} on " in message
        assert f"in {folder.parent}; wait for its end, or choose another run.name" in message
        with alone(folder.with_name("other"), pytest.fail):
            pass
    finally:
        holder.kill()
        holder.wait()
    with alone(folder, pytest.fail):
        assert [file.name for file in folder.parent.iterdir()] == [".mine.lock"]
    assert list(folder.parent.iterdir()) == []


def test_an_error_lets_it_go_and_leaves_nothing(folder, tmp_path):
    with pytest.raises(KeyError), alone(folder, pytest.fail):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with alone(folder, pytest.fail):
        folder.mkdir()
    assert list(folder.parent.iterdir()) == [folder]


def test_the_lock_of_another_machine_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_S", 0.0)
    folder.parent.mkdir()
    said: list[str] = []
    with (folder.parent / ".mine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is at this run" in refused(folder)
        json.dump({"pid": 1, "host": "node-b"}, lock)
        lock.flush()

        def free(line: str) -> None:
            said.append(line)
            fcntl.flock(lock, fcntl.LOCK_UN)

        with alone(folder, free):
            assert "process 1 on node-b is at this run" in said[0]
            assert "waiting 150 s" in said[0]

    with (folder.parent / ".mine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        json.dump({"pid": 1, "host": "node-b"}, lock)
        lock.flush()
        monkeypatch.setattr(module, "_LEASE_S", 0.0)
        assert "process 1 on node-b is at this run" in refused(folder)
    assert len(said) == 1


def test_a_file_that_its_holder_removes_meanwhile_is_not_taken_for_the_run(folder, monkeypatch):
    """Two that lock a file each, one of them without a name, would both have the run."""
    path, times, flock = folder.parent / ".mine.lock", [], fcntl.flock

    def lock(handle, how):
        if not times:
            path.unlink()
        times.append(how)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", lock)
    with alone(folder, pytest.fail):
        assert len(times) == 2
        assert "at this run" in refused(folder)


def test_a_file_system_without_locks_is_no_reason_not_to_run(folder, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with alone(folder, pytest.fail):
        pass


def test_a_place_that_cannot_be_written_names_the_key(folder):
    folder.parent.write_text("a file")
    message = refused(folder)
    assert message.startswith(f"run.dir = '{folder.parent}': cannot write ")
