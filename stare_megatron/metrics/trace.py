"""`trace.jsonl`: what every process of a run did and when, a line a step; and the same as Chrome and Perfetto read it.

The format: Trace Event Format (Google, "Trace Event Format" document), complete events (`X`), flows (`s`, `f`) and
names (`M`); times in microseconds.
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.host.files import append_line, write_atomic
from stare_megatron.types.report import Activity

FILE, OLDER = "trace.jsonl", "trace.1.jsonl"
DRIVER = "driver"
_MOST_BYTES = 64 << 20  # of the two files together
_DETAIL = 80  # characters
_DIGITS = 10

Event = dict[str, Any]
"""A trace event as the format has it: its fields depend on its phase."""


@dataclass(frozen=True)
class StepTrace:
    """One step: what each process did, by its name, and the prompts whose groups its update used."""

    step: int
    tracks: Mapping[str, Sequence[Activity]]
    trained: Sequence[str]


class TraceFile:
    """Appends steps. When the file has half of what the trace may take, it becomes the older one, and the older one
    goes."""

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        self._path, self._older = folder / FILE, folder / OLDER
        self._half = most_bytes // 2

    def append(self, trace: StepTrace) -> None:
        tracks = {
            name: [[a.name, round(a.start, 6), round(a.seconds, 6), a.detail[:_DETAIL]] for a in activities]
            for name, activities in trace.tracks.items()
        }
        trained = [name[:_DETAIL] for name in trace.trained]
        line = json.dumps({"step": trace.step, "tracks": tracks, "trained": trained}, separators=(",", ":"))
        if self._path.exists() and self._path.stat().st_size + len(line) > self._half:
            os.replace(self._path, self._older)
        append_line(self._path, line)


def read(folder: Path) -> list[StepTrace]:
    """The steps of a run's folder, in the order they were written. A line cut off in writing is left out.

    Raises:
        UserError: the folder has no trace.
    """
    files = [path for path in (folder / OLDER, folder / FILE) if path.is_file()]
    if not files:
        raise UserError(f"{folder}: holds no {FILE}; name the folder of a run with logging.trace = true")
    return [step for path in files for step in _lines(path)]


def _lines(path: Path) -> Iterator[StepTrace]:
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
            tracks = {name: [Activity(*a) for a in activities] for name, activities in row["tracks"].items()}
            yield StepTrace(row["step"], tracks, row["trained"])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path}, line {number}: damaged ({e!r:.80}); remove the line") from e


def parse_steps(text: str) -> tuple[int, int] | None:
    """First and last of `7` or `3-5`; None of an empty text.

    Raises:
        UserError: anything else.
    """
    if not text:
        return None
    first, dash, last = text.partition("-")
    ends = first, last if dash else first
    if not all(end.isdecimal() and len(end) < _DIGITS for end in ends) or int(ends[0]) > int(ends[1]):
        raise UserError(f"--steps {text}: give a step or a range of steps, such as 7 or 3-5")
    return int(ends[0]), int(ends[1])


def write_chrome(folder: Path, out: Path, steps: tuple[int, int] | None = None) -> int:
    """Write `out` from a run's folder; returns the number of steps in it.

    `steps`: the first and the last to write; None: all there are.

    Raises:
        UserError: no trace, or no such steps.
    """
    found = read(folder)
    chosen = [s for s in found if steps is None or steps[0] <= s.step <= steps[1]]
    if not chosen:
        there = f"{found[0].step} to {found[-1].step}" if found else "none"
        raise UserError(f"{folder}: no trace of the steps asked for; there are {there}")
    write_atomic(out, json.dumps({"traceEvents": events(chosen), "displayTimeUnit": "ms"}))
    return len(chosen)


def events(steps: Sequence[StepTrace]) -> list[Event]:
    """The events of these steps: a process a track; an arrow from each group to the update that used it, which is of a
    later step where engines sample ahead."""
    names = sorted({name for s in steps for name in s.tracks}, key=lambda name: (name != DRIVER, _natural(name)))
    pids = {name: pid for pid, name in enumerate(names)}
    starts = [a.start for s in steps for activities in s.tracks.values() for a in activities]
    origin = min(starts, default=0.0)
    made: list[Event] = []
    sampled: dict[str, list[_Sampled]] = {}
    for name, pid in pids.items():
        made.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
        made.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
    for s in steps:
        lanes = {name: _lanes(name, activities) for name, activities in s.tracks.items()}
        for name, activities in s.tracks.items():
            for activity, lane in zip(activities, lanes[name], strict=True):
                place = {"pid": pids[name], "tid": lane}
                made.append(_complete(activity, s.step, origin) | place)
                if activity.name == "sample":
                    sampled.setdefault(activity.detail, []).append(_Sampled(activity, pids[name], lane))
        made += _flows(s, sampled, pids.get(DRIVER, 0), origin, first=len(made))
    return made


def _complete(a: Activity, step: int, origin: float) -> Event:
    return {
        "ph": "X",
        "name": a.name,
        "cat": "activity",
        "ts": _us(a.start - origin),
        "dur": _us(a.seconds),
        "args": {"step": step} | ({"of": a.detail} if a.detail else {}),
    }


@dataclass(frozen=True)
class _Sampled:
    """An activity that sampled a group, and where it is drawn."""

    activity: Activity
    pid: int
    lane: int


def _flows(s: StepTrace, sampled: dict[str, list[_Sampled]], driver: int, origin: float, first: int) -> list[Event]:
    """Arrows to this step's update from what sampled its groups, in this step or in one before; that is taken out of
    `sampled`. Of a prompt that was sampled more than once it is the newest group, whose parts overlap in time, or all
    where the step used the prompt more than once."""
    update = next((a for a in s.tracks.get(DRIVER, ()) if a.name == "update"), None)
    if update is None:
        return []
    made: list[Event] = []
    for name, times in collections.Counter(s.trained).items():
        before = [one for one in sampled.get(name, ()) if one.activity.start <= update.end]
        if not before:
            continue
        sampled[name] = [one for one in sampled[name] if one.activity.start > update.end]
        newest = max(before, key=lambda one: one.activity.end).activity
        for one in before:
            if times == 1 and one.activity.end < newest.start:
                continue
            same: Event = {"name": "trained on", "cat": "groups", "id": first + len(made)}
            at_end = {"ph": "s", "pid": one.pid, "tid": one.lane, "ts": _us(one.activity.end - origin)}
            at_update = {"ph": "f", "bp": "e", "pid": driver, "tid": 0, "ts": _us(update.start - origin)}
            made += [same | at_end, same | at_update]
    return made


def _lanes(track: str, activities: Sequence[Activity]) -> list[int]:
    """A lane for each activity, so that those of a lane do not overlap. The driver's are nested, and have one."""
    lanes = [0] * len(activities)
    if track == DRIVER:
        return lanes
    free: list[float] = []  # when each lane ends
    for i in sorted(range(len(activities)), key=lambda i: activities[i].start):
        a = activities[i]
        lane = next((n for n, end in enumerate(free) if end <= a.start), len(free))
        free[lane:] = [a.end, *free[lane + 1 :]]
        lanes[i] = lane
    return lanes


def _natural(name: str) -> tuple[str, int]:
    """`engine 10` after `engine 9`."""
    kind, _, number = name.rpartition(" ")
    return (kind, int(number)) if number.isdecimal() else (name, 0)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
