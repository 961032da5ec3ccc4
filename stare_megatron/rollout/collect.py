"""From prompts to the groups of one update batch, with dynamic sampling.

Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal has advantage 0 everywhere; it is
dropped, and its place is given to the next prompt at once, until `rollout.prompts_per_step` groups are useful or
`rollout.max_refills` times as many prompts were sampled again. What is missing then is filled with dropped groups, so
that an update batch always has `rollout.prompts_per_step` groups.

Groups that are useful and groups that are not known yet are never more than a batch, so that every useful group is
used. Prompts are taken in their order, and as many are taken as are needed for a batch of the first useful ones: which
these are does not depend on which group ends first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from stare_megatron.config import Config
from stare_megatron.data.benchmarks import source_labels
from stare_megatron.data.prompts import PromptStream
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.types import GroupRequest, GroupSummary, Measured, Sampling, Status
from stare_megatron.types.measured import mean

Ref = TypeVar("Ref")
Ref_co = TypeVar("Ref_co", covariant=True)

_MOST = 0.9  # of a batch's groups; what is waited for after them is the tail
# Of what is sampled for a step: 0 where, in a stream, no group has finished since the step before.
_COUNTS = (
    *("groups/sampled", "groups/all_correct", "groups/none_correct"),
    *("response/failed", "response/ungraded", "response/inexact"),
)


class GroupDispatcher(Protocol[Ref_co]):
    """Where requests are served. A `Ref` stands for a group whose tokens stay where they are."""

    def submit(self, requests: Iterable[GroupRequest]) -> None:
        """Serve these too, after those that wait already."""
        ...

    def results(self) -> Iterator[tuple[GroupRequest, Ref_co, GroupSummary]]:
        """Every submitted request once it is served, in any order, also what is submitted meanwhile."""
        ...


@dataclass(frozen=True)
class Resumed:
    """What a run that goes on has of what another was sampling: finished `groups`; of the other groups the `graded`
    trajectories, the `partial` ones that are continued, and those that are begun `again`."""

    groups: int = 0
    graded: int = 0
    partial: int = 0
    again: int = 0

    def __add__(self, other: Resumed) -> Resumed:
        return Resumed(
            self.groups + other.groups,
            self.graded + other.graded,
            self.partial + other.partial,
            self.again + other.again,
        )

    def __str__(self) -> str:
        return (
            f"{self.groups} finished groups, and of others {self.graded} finished and {self.partial} partial "
            f"trajectories, go on from the run before; {self.again} trajectories start again"
        )


@dataclass(frozen=True)
class Collected(Generic[Ref]):
    """The groups of one update batch, in the order of their requests. `sampled`: all groups sampled for it, dropped
    ones included; `measured` of them and of the batch; `seconds`: from the first request to the last result; `tail`: of
    those, since nine of ten groups were finished; `running`, `ready`: other groups that were being sampled, and that
    were finished, when it was handed out; `resumed`: what was taken since the batch before of an earlier run."""

    groups: tuple[tuple[Ref, GroupSummary], ...]
    sampled: tuple[GroupSummary, ...]
    measured: tuple[Measured, ...]
    seconds: float = field(compare=False)
    tail: float = field(default=0.0, compare=False)
    running: int = field(default=0, compare=False)
    ready: int = field(default=0, compare=False)
    resumed: Resumed = field(default=Resumed(), compare=False)

    @property
    def tokens_sampled(self) -> int:
        """Action tokens of all groups that were sampled for it."""
        return sum(n for summary in self.sampled for n in summary.num_action_tokens)


class Collector(Generic[Ref]):
    """Samples update batches. What it collects depends on the stream, the seed and the step, not on timing."""

    def __init__(self, config: Config, dispatcher: GroupDispatcher[Ref], stream: PromptStream) -> None:
        r = config.rollout
        self._dispatcher = dispatcher
        self._stream = stream
        self._labels = source_labels(stream.prompts)
        self._seed = config.run.seed
        self._group_size = r.group_size
        self._sampling = Sampling(r.max_response_tokens, r.temperature, r.top_p, tuple(r.stop), seed=0)
        self._wanted = r.prompts_per_step
        self._dynamic = r.dynamic_sampling
        self._refills = r.refills

    def collect(self, step: int) -> Collected[Ref]:
        """Sample the update batch of a step."""
        began = time.monotonic()
        useful: list[tuple[int, Ref, GroupSummary]] = []
        others: list[tuple[int, Ref, GroupSummary]] = []
        drawn = self._wanted
        ends: list[float] = []
        self._dispatcher.submit(self.request(step, order) for order in range(drawn))
        for request, ref, summary in self._dispatcher.results():
            ends.append(time.monotonic())
            if self.useful(summary):
                useful.append((request.order, ref, summary))
                continue
            others.append((request.order, ref, summary))
            if len(others) <= self._refills:
                self._dispatcher.submit([self.request(step, drawn)])
                drawn += 1
        others.sort(key=_order)
        sampled = [summary for _, _, summary in sorted(useful + others, key=_order)]
        fill = self._wanted - len(useful)
        kept = sorted(useful + others[:fill], key=_order)
        groups = [(ref, summary) for _, ref, summary in kept]
        tail = ends[-1] - ends[math.ceil(_MOST * len(ends)) - 1]
        return self.collected(step, groups, sampled, len(others) - fill, time.monotonic() - began, tail)

    def useful(self, summary: GroupSummary) -> bool:
        """Whether a group is learned from, or dropped for another."""
        return not (self._dynamic and summary.zero_variance)

    def collected(
        self,
        step: int,
        groups: Sequence[tuple[Ref, GroupSummary]],
        sampled: Sequence[GroupSummary],
        dropped: int,
        seconds: float,
        tail: float = 0.0,
    ) -> Collected[Ref]:
        """The update batch of a step, of `groups` and all that were `sampled` for it, each in the order of their
        requests; `dropped`: of the latter, so many were dropped and are not in the batch."""
        measured = (
            *(part for s in sampled for part in measure(s, self._labels[s.source])),
            *(Measured(name, 0) for name in _COUNTS),
            Measured("groups/dropped", dropped),
            *(part for _, s in groups for part in _measure_kept(s, step)),
            Measured("sync/staleness_p95", age_quantile([s for _, s in groups], step, 0.95)),
        )
        return Collected(tuple(groups), tuple(sampled), measured, seconds, tail)

    def request(self, step: int, order: int) -> GroupRequest:
        """The next prompt's, the `order`-th of those drawn with the policy that the step changes."""
        (prompt,) = self._stream.take(1)
        sampling = dataclasses.replace(self._sampling, seed=derive_seed(self._seed, step, order))
        return GroupRequest(order, prompt, self._group_size, sampling)


def _order(item: tuple[int, object, GroupSummary]) -> int:
    return item[0]


def measure(group: GroupSummary, label: str) -> list[Measured]:
    """Of a sampled group, whether it is dropped or not. `label`: of its source."""
    lengths, episodes = group.num_action_tokens, group.episodes
    calls = sum(e.calls for e in episodes)
    return [
        *(Measured("reward/mean", reward) for reward in group.rewards),
        mean("reward/correct", group.correct),
        mean(f"source/{label}/reward", group.rewards),
        mean(f"source/{label}/correct", group.correct),
        Measured("groups/sampled", 1),
        Measured("groups/all_correct", int(all(group.correct))),
        Measured("groups/none_correct", int(not any(group.correct))),
        Measured("groups/all_correct_ratio", all(group.correct)),
        Measured("groups/none_correct_ratio", not any(group.correct)),
        mean("response/length_mean", lengths),
        Measured("response/length_max", max(lengths)),
        mean("response/truncated", [status.is_truncated for status in group.statuses]),
        Measured("response/failed", group.statuses.count(Status.FAILED)),
        Measured("response/ungraded", group.graded.count(False)),
        Measured("response/inexact", group.statuses.count(Status.INEXACT)),
        mean("response/reflections", group.reflections),
        mean("tools/turns", [e.turns for e in episodes]),
        mean("tools/calls", [e.calls for e in episodes]),
        Measured("tools/call_errors", sum(e.call_errors for e in episodes), calls),
        *(Measured("tools/seconds", e.tool_seconds) for e in episodes),
        Measured("tools/seconds_max", max((e.tool_seconds for e in episodes), default=0.0)),
        mean("tools/observation_tokens", [e.observation_tokens for e in episodes]),
        mean("tools/void", [e.void for e in episodes]),
        *group.measured,
    ]


def _measure_kept(group: GroupSummary, step: int) -> list[Measured]:
    """Of a group of the update batch of a step."""
    runs = group.version_runs()
    ages = [(step - version, tokens) for of_sample in runs for version, tokens in of_sample]
    spans = [len(of_sample) for of_sample in runs]
    return [
        *(Measured("reward/kept_mean", reward) for reward in group.rewards),
        Measured("groups/zero_variance_kept", int(group.zero_variance)),
        Measured("sync/staleness", max(step - version for version in group.weight_versions)),
        Measured("sync/staleness_mean", sum(age * n for age, n in ages), sum(n for _, n in ages)),
        mean("sync/version_spans", spans),
        Measured("sync/version_spans_max", max(spans)),
    ]


def age_quantile(groups: Iterable[GroupSummary], step: int, share: float) -> float:
    """The smallest age that at least this share of the groups' action tokens do not exceed, versions."""
    runs = [run for group in groups for of_sample in group.version_runs() for run in of_sample]
    wanted = share * sum(tokens for _, tokens in runs)
    ages = sorted((step - version, tokens) for version, tokens in runs)
    passed = itertools.accumulate(tokens for _, tokens in ages)
    return next((age for (age, _), n in zip(ages, passed, strict=True) if n >= wanted), 0)
