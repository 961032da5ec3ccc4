"""`events.jsonl`: what happened to a run and its processes, one JSON object a line; and the same in words.

{"time": "2026-11-28T01:02:03.4+00:00", "who": "engine 1", "node": "node-b (10.0.0.2)", "old": "HEALTHY",
 "new": "DEAD", "reason": "its process died: ..."}
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path

from stare_megatron.host.files import append_line
from stare_megatron.types.report import RunEvent

FILE = "events.jsonl"


class Events:
    """Writes events to the run's folder and, those that are news, to the screen.

    Args:
        folder: the run's. note: shows the user a line.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self._path = folder / FILE
        self._note = note

    def __call__(self, event: RunEvent) -> None:
        row = dataclasses.asdict(event)
        del row["news"]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        try:
            append_line(self._path, json.dumps({"time": now} | row))
        except OSError as e:  # the run need not end for it, nor hide what it ends for
            self._note(f"{self._path}: cannot be written: {e.strerror}: {text(event)}")
            return
        if event.news:
            self._note(text(event))

    def happened(self, who: str, what: str, reason: str) -> None:
        """Something that is no change of a state; the screen has it from elsewhere, or need not."""
        self(RunEvent(who, "", "", what, reason, news=False))

    def noted(self, who: str, what: str) -> Callable[[str], None]:
        """Shows the user a line, and has it on record as something that happened."""

        def say(reason: str) -> None:
            self._note(reason)
            self.happened(who, what, reason)

        return say


def text(event: RunEvent) -> str:
    """An event as one line."""
    where = f" on {event.node}" if event.node else ""
    return f"{event.who}{where}: {change(event.old, event.new)}: {event.reason}"


def change(old: str, new: str) -> str:
    """From a state to another, or what happened."""
    return f"{old} -> {new}" if old else new
