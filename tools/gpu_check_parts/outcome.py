"""What a part is told, and what it answers."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "outcome.json"  # in the part's folder


class Status(enum.Enum):
    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"
    TIMED_OUT = "timed out"


@dataclass(frozen=True)
class Context:
    """`device`: `cuda` or `cpu`; `folder`: the part's own, its log is there; `shared`: one for all parts, e.g. of
    models; `seconds`: until it is stopped; `beside`: whether other parts run at the same time."""

    device: str
    folder: Path
    shared: Path
    seconds: float
    beside: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass
class Outcome:
    """`reason`: why it failed or was skipped; `numbers`: what was measured, by name, as JSON can hold it."""

    status: Status = Status.OK
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """Note one thing that is wrong; the first of several comes first."""
        self.status = Status.FAILED
        self.reason = f"{self.reason}; {reason}" if self.reason else reason

    def require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.fail(otherwise)

    def near(self, name: str, got: float, want: float, tolerance: float, *, relative: bool = False) -> None:
        """Keep the difference under `name`, and fail beyond `tolerance` (a NaN does)."""
        difference = abs(got - want) / (abs(want) if relative else 1.0)
        self.numbers[name] = difference
        self.require(difference <= tolerance, f"{name}: {got:.6g} for {want:.6g}, {difference:.2g} > {tolerance:g}")

    def to_json(self) -> str:
        return json.dumps({"status": self.status.value, "reason": self.reason, "numbers": self.numbers}) + "\n"


def parse(text: str) -> Outcome:
    """What `to_json` wrote.

    Raises:
        ValueError: it is something else.
    """
    content = json.loads(text)
    try:
        outcome = Outcome(Status(content["status"]), content["reason"], content["numbers"])
    except (KeyError, TypeError) as e:
        raise ValueError(f"not an outcome: {e!r}") from e
    if not isinstance(outcome.reason, str) or not isinstance(outcome.numbers, dict):
        raise ValueError("not an outcome: `reason` is text, `numbers` an object")
    return outcome


def skipped(reason: str) -> Outcome:
    return Outcome(Status.SKIPPED, reason)
