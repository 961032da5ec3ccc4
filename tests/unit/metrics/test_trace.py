"""The trace of a run: bounded on disk, and whole as Chrome's and Perfetto's viewers read it."""

import itertools
import json

import pytest

from stare_megatron.__main__ import main
from stare_megatron.errors import UserError
from stare_megatron.metrics import trace
from stare_megatron.metrics.trace import StepTrace, TraceFile, events, parse_steps, read, write_chrome
from stare_megatron.types.report import Activity

START = 1.8e9


def step(number: int) -> StepTrace:
    at = START + 10 * number
    first, second = Activity("sample", at, 3.0, "a"), Activity("sample", at + 1, 3.0, "b")
    tracks = {
        "driver": [Activity(f"step {number}", at, 9.0), Activity("rollout", at, 4.0), Activity("update", at + 5, 3.0)],
        "engine 0": [first, second, Activity("sleep", at + 4, 1.0)],
        "engine 10": [Activity("sample", at + 0.5, 2.0, "dropped")],
        "engine 9": [],
        "trainer rank 0": [Activity("update", at + 5, 3.0)],
    }
    return StepTrace(number, tracks, ["a", "b"])


def of(found: list[dict], ph: str) -> list[dict]:
    return [e for e in found if e["ph"] == ph]


def test_each_process_is_a_track_and_what_overlaps_has_lanes_of_its_own():
    found = events([step(1), step(2)])
    names = [e["args"]["name"] for e in of(found, "M") if e["name"] == "process_name"]
    assert names == ["driver", "engine 0", "engine 9", "engine 10", "trainer rank 0"]
    done = of(found, "X")
    assert len(done) == 2 * 8
    assert min(e["ts"] for e in done) == 0
    for pid in range(1, len(names)):
        for lane in {e["tid"] for e in done if e["pid"] == pid}:
            own = sorted((e["ts"], e["dur"]) for e in done if (e["pid"], e["tid"]) == (pid, lane))
            assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(own))
    assert {e["tid"] for e in done if e["pid"] == 1} == {0, 1}
    assert {e["tid"] for e in done if e["pid"] == 0} == {0}


def test_an_arrow_leads_from_each_group_that_was_trained_on_to_its_update():
    found = events([step(1), step(2)])
    begins, ends = ({e["id"]: e for e in of(found, ph)} for ph in "sf")
    assert begins.keys() == ends.keys()
    assert len(begins) == 4
    for key, begin in begins.items():
        assert begin["ts"] <= ends[key]["ts"]
        assert ends[key]["pid"] == 0
        assert ends[key]["ts"] in (5e6, 15e6)


def test_an_arrow_leads_to_the_update_of_a_later_step_where_engines_sample_ahead():
    """As in `one_step` and `stream`: what step 2 learns from was sampled in step 1, one group in two parts."""
    update = Activity("update", START + 10, 3.0)
    parts = Activity("sample", START + 4, 3.0, "a"), Activity("sample", START + 5, 6.0, "a")
    before = Activity("sample", START, 1.0, "a")  # of an earlier epoch, and dropped
    after = Activity("sample", START + 15, 1.0, "b")
    steps = [
        StepTrace(1, {"driver": [], "engine 0": [before, parts[0], Activity("sample", START + 3, 1.0, "b")]}, []),
        StepTrace(2, {"driver": [update], "engine 1": [parts[1], after]}, ["a", "b"]),
        StepTrace(3, {"driver": [Activity("update", START + 20, 3.0)], "engine 0": []}, ["b"]),
    ]
    made = events(steps)
    ends = {(e["pid"], e["ts"]): e["id"] for e in of(made, "s")}
    updates = {e["id"]: e["ts"] for e in of(made, "f")}
    assert {place: updates[key] for place, key in ends.items()} == {
        (1, 7e6): 10e6,
        (2, 11e6): 10e6,
        (1, 4e6): 10e6,
        (2, 16e6): 20e6,
    }


def test_a_trace_takes_no_more_than_it_may_and_loses_the_oldest(tmp_path):
    file = TraceFile(tmp_path, most_bytes=4000)
    for number in range(1, 60):
        file.append(step(number))
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 4000
    kept = [s.step for s in read(tmp_path)]
    assert kept == list(range(kept[0], 60))
    assert len(kept) > 3
    assert read(tmp_path)[-1] == step(59)


def test_long_names_are_cut_alike_where_groups_and_updates_meet(tmp_path):
    name = "q" * 999
    tracks = {"driver": [Activity("update", START + 2, 1.0)], "engine 0": [Activity("sample", START, 1.0, name)]}
    made = StepTrace(1, tracks, [name])
    TraceFile(tmp_path).append(made)
    assert len((tmp_path / trace.FILE).read_text()) < 400
    assert len(of(events(read(tmp_path)), "s")) == 1


def test_the_command_writes_what_the_viewers_read(tmp_path, capsys):
    file = TraceFile(tmp_path)
    for number in range(1, 6):
        file.append(step(number))
    with (tmp_path / trace.FILE).open("a") as torn:
        torn.write('{"step": 6, "tra')
    assert main(["trace", str(tmp_path), "--steps", "2-4"]) == 0
    assert "3 step(s)" in capsys.readouterr().out
    written = json.loads((tmp_path / "trace.json").read_text())
    assert {e["args"]["step"] for e in written["traceEvents"] if e["ph"] == "X"} == {2, 3, 4}
    assert all(e["dur"] >= 0 for e in written["traceEvents"] if e["ph"] == "X")


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"holds no trace\.jsonl; .*logging\.trace"):
        write_chrome(tmp_path, tmp_path / "t.json")
    TraceFile(tmp_path).append(step(3))
    with pytest.raises(UserError, match="there are 3 to 3"):
        write_chrome(tmp_path, tmp_path / "t.json", (4, 5))
    (tmp_path / trace.FILE).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"trace\.jsonl, line 1: damaged"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["x", "1-", "-1", "5-3", "1-2-3", "9" * 5000])
def test_steps_are_numbers(text):
    with pytest.raises(UserError, match="give a step or a range"):
        parse_steps(text)
    assert parse_steps("7") == (7, 7)
