"""What the catalogue says of a metric."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reduction(Enum):
    """How `reduce` makes one number of many: of the samples, tokens, updates or processes of the step."""

    MEAN = "mean"
    TOKEN_MEAN = "mean over action tokens"
    FRACTION = "part by whole; 0 of nothing"
    SUM = "sum"
    MAX = "max"
    ONE = "one value per step"
    LAST = "that of the step's last update"
    UPDATE_MEAN = "mean over the step's updates"
    UPDATE_SUM = "sum over the step's updates"
    UPDATE_MAX = "max over the step's updates"
    PROCESS_MAX = "max over processes"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue."""

    name: str
    unit: str
    reduction: Reduction
    meaning: str
