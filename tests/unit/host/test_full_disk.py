"""A disk that has no room left: files keep the lines that they had. A limit of a file's size stands for it, which the
kernel applies in the same way: what still fits is written, then the write fails."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator

import pytest

from stare_megatron.host.files import append_line, write_atomic
from stare_megatron.metrics import jsonl, trace
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.events import Events


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """No file may be longer than `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, "one")
    with room(10), pytest.raises(OSError, match=r"lines\.jsonl"):
        append_line(path, "two, which is long")
    assert path.read_text() == "one\n"
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


@pytest.mark.parametrize("whole", ["", "one\n", "a" * 70_000 + "\n"])
def test_what_a_killed_writer_was_cut_off_in_is_taken_away(tmp_path, whole):
    path = tmp_path / "lines.jsonl"
    path.write_text(f"{whole}cut o")
    append_line(path, "next")
    assert path.read_text() == f"{whole}next\n"


def test_a_trace_is_read_after_its_last_line_was_cut_off(tmp_path):
    file = trace.TraceFile(tmp_path)
    file.append(trace.StepTrace(1, {}, []))
    with (tmp_path / trace.FILE).open("a") as f:
        f.write('{"step":2,"tr')
    file.append(trace.StepTrace(2, {}, ["p"]))
    assert [step.step for step in trace.read(tmp_path)] == [1, 2]


def test_metrics_keep_the_steps_they_have(tmp_path):
    path = tmp_path / jsonl.FILE
    sink = jsonl.JsonlSink(path, 0)
    sink.log(1, [Metric("policy/entropy", 0.5, "nats/token")])
    sink.log(2, [Metric("policy/entropy", 0.25, "nats/token")])
    before = path.read_bytes()
    with room(len(before) + 10):
        with pytest.raises(OSError, match=jsonl.FILE):
            sink.amend([Metric("time/step", 1.5, "s")])
        assert path.read_bytes() == before
        with pytest.raises(OSError, match=jsonl.FILE):
            sink.log(3, [Metric("policy/entropy", 0.125, "nats/token")])
    sink.close()
    assert path.read_bytes() == before


def test_a_file_that_is_replaced_is_the_old_one_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "loop.json"
    write_atomic(path, "old")
    with room(10), pytest.raises(OSError, match=r"loop\.json"):
        write_atomic(path, "x" * 100)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_event_without_room_does_not_hide_what_it_is_about(tmp_path):
    said: list[str] = []
    events = Events(tmp_path, said.append)
    events.happened("run", "RESUMED", "from step 1")
    with room(10):
        events.happened("run", "FAILED", "engine 0: its process died")
    assert len(said) == 1
    assert "events.jsonl: cannot be written: File too large: run: FAILED: engine 0: its process died" in said[0]
    (line,) = (tmp_path / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["new"] == "RESUMED"
