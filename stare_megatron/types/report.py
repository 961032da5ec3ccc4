"""What a process tells the driver of itself: what it did and when, and what that took."""

from __future__ import annotations

from dataclasses import dataclass

from stare_megatron.types.measured import Measured


@dataclass(frozen=True)
class Activity:
    """Something that a process did. `start`: seconds since the epoch, of its machine's clock; `detail`: of what.

    Example:
        Activity("sample", start=1795813932.1, seconds=2.4, detail="sum-00017")
    """

    name: str
    start: float
    seconds: float
    detail: str = ""

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class EngineLoad:
    """How full an engine was, summed over the iterations of its scheduler in which a request ran. `requests`: that ran;
    `kv_use`: share of the KV cache that was taken, and the largest; `preemptions`: requests put back for want of it;
    `drafts`: times that tokens were drafted for a request, with how many, and how many of them it kept."""

    iterations: int = 0
    requests: int = 0
    kv_use: float = 0.0
    kv_use_max: float = 0.0
    preemptions: int = 0
    drafts: int = 0
    tokens_drafted: int = 0
    tokens_accepted: int = 0


@dataclass(frozen=True)
class Report:
    """Of one process, since its last report. `peak_bytes`: its largest memory so far."""

    activities: tuple[Activity, ...]
    peak_bytes: int


@dataclass(frozen=True)
class RankReport(Report):
    """`measured`: of its phases, pushes and saves."""

    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class EngineReport(Report):
    load: EngineLoad


@dataclass(frozen=True)
class RunEvent:
    """What happened in a run. `who`: `engine 1`, `trainer ranks`, or what has no states: `run`, `sampling`, `push`;
    `node`: host and address, as far as known; `old` and `new`: its states, or "" and what happened; `news`: worth a
    line on the screen."""

    who: str
    node: str
    old: str
    new: str
    reason: str
    news: bool = True


@dataclass(frozen=True)
class Position:
    """Where a rank stands. Ranks of one `data_parallel_rank` train on the same sequences. It is here, and not with the
    ranks, since who reads it would import Megatron-Core with it."""

    data_parallel_rank: int
    tensor_parallel_rank: int
    pipeline_parallel_rank: int
    context_parallel_rank: int
    is_last_stage: bool
