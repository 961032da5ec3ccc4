"""From prompts to the groups of one update batch, with dynamic sampling.

Dynamic sampling (DAPO, arXiv 2503.14476): a group whose rewards are all equal has advantage 0 everywhere; it is
dropped and others are sampled, at most `rollout.max_refills` generation batches more. What is missing then is filled
with dropped groups, so that an update batch always has `rollout.prompts_per_step` groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from stare_megatron.config import Config
from stare_megatron.data.prompts import PromptStream
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.types import EpisodeCounts, GroupRequest, GroupSummary, Sampling, Status

Ref = TypeVar("Ref")
Ref_co = TypeVar("Ref_co", covariant=True)


class GroupDispatcher(Protocol[Ref_co]):
    """Where requests are served. A `Ref` stands for a group whose tokens stay where they are."""

    def run(self, requests: Sequence[GroupRequest]) -> Iterable[tuple[GroupRequest, Ref_co, GroupSummary]]:
        """Serve every request; the results come in any order."""
        ...


@dataclass(frozen=True)
class SourceStats:
    """Trajectories sampled of one source's prompts: how many, their mean reward, the share that is correct."""

    trajectories: int
    reward_mean: float
    correct_fraction: float


@dataclass(frozen=True)
class ToolStats:
    """Turns and tool calls of an update batch's sampled trajectories; all 0 without an environment with tools.

    `turns`, `calls`, `observation_tokens`, `seconds`: a trajectory; `seconds_max`: of the one that spent most in calls;
    `call_errors`: share of the calls; `void`: share of the trajectories.
    """

    turns: float
    calls: float
    call_errors: float
    seconds: float
    seconds_max: float
    observation_tokens: float
    void: float


@dataclass(frozen=True)
class CollectStats:
    """What sampling one update batch took; all of it over ALL sampled groups, also those that were dropped.

    `groups_sampled` in `generation_batches`; `zero_variance`: groups with all rewards equal, of which
    `zero_variance_dropped` are not in the update batch; `surplus_dropped`: informative groups beyond what was asked
    for; `all_correct`, `none_correct`: groups with every, no trajectory correct; `reward_mean`, `correct_fraction`,
    `truncated_fraction`: over trajectories; `length_mean`, `length_max`, `tokens_sampled`: action tokens; `failed`,
    `ungraded` (those that failed among them), `inexact`: trajectories; `reflections_mean`: reflection words a response;
    `by_source`: what was sampled of each source; `tools`: turns and calls.
    """

    groups_sampled: int
    generation_batches: int
    zero_variance: int
    zero_variance_dropped: int
    surplus_dropped: int
    all_correct: int
    none_correct: int
    reward_mean: float
    correct_fraction: float
    truncated_fraction: float
    failed: int
    ungraded: int
    length_mean: float
    length_max: int
    tokens_sampled: int
    reflections_mean: float
    by_source: Mapping[str, SourceStats]
    inexact: int
    tools: ToolStats


@dataclass(frozen=True)
class Collected(Generic[Ref]):
    """The groups of one update batch, in the order of their requests."""

    groups: tuple[tuple[Ref, GroupSummary], ...]
    stats: CollectStats


class Collector(Generic[Ref]):
    """Samples update batches. What it collects depends on the stream, the seed and the step, not on timing."""

    def __init__(self, config: Config, dispatcher: GroupDispatcher[Ref], stream: PromptStream) -> None:
        r = config.rollout
        self._dispatcher = dispatcher
        self._stream = stream
        self._seed = config.run.seed
        self._group_size = r.group_size
        self._sampling = Sampling(r.max_response_tokens, r.temperature, r.top_p, tuple(r.stop), seed=0)
        self._wanted = r.prompts_per_step
        self._dynamic = r.dynamic_sampling
        self._batch = (r.prompts_per_generation or r.prompts_per_step) if r.dynamic_sampling else r.prompts_per_step
        self._batches = 1 + (r.max_refills if r.dynamic_sampling else 0)

    def collect(self, step: int) -> Collected[Ref]:
        """Sample the update batch of a step."""
        informative: list[tuple[int, Ref, GroupSummary]] = []
        spare: list[tuple[int, Ref, GroupSummary]] = []
        summaries: list[GroupSummary] = []
        batches = 0
        while batches < self._batches and len(informative) < self._wanted:
            requests = self._requests(step, first=batches * self._batch)
            results = sorted(self._dispatcher.run(requests), key=lambda result: result[0].order)
            for request, ref, summary in results:
                summaries.append(summary)
                useful = not (self._dynamic and summary.zero_variance)
                (informative if useful else spare).append((request.order, ref, summary))
            batches += 1
        surplus = len(informative) - self._wanted
        kept = informative[: self._wanted]
        fill = spare[: self._wanted - len(kept)]
        kept = sorted(kept + fill, key=lambda item: item[0])
        stats = _stats(summaries, batches, len(spare) - len(fill), max(0, surplus))
        return Collected(tuple((ref, summary) for _, ref, summary in kept), stats)

    def _requests(self, step: int, first: int) -> list[GroupRequest]:
        def sampling(order: int) -> Sampling:
            return dataclasses.replace(self._sampling, seed=derive_seed(self._seed, step, order))

        return [
            GroupRequest(order, prompt, self._group_size, sampling(order))
            for order, prompt in enumerate(self._stream.take(self._batch), start=first)
        ]


def _stats(summaries: list[GroupSummary], batches: int, dropped: int, surplus: int) -> CollectStats:
    rewards = [reward for s in summaries for reward in s.rewards]
    correct = [c for s in summaries for c in s.correct]
    lengths = [n for s in summaries for n in s.num_action_tokens]
    statuses = [status for s in summaries for status in s.statuses]
    return CollectStats(
        groups_sampled=len(summaries),
        generation_batches=batches,
        zero_variance=sum(s.zero_variance for s in summaries),
        zero_variance_dropped=dropped,
        surplus_dropped=surplus,
        all_correct=sum(all(s.correct) for s in summaries),
        none_correct=sum(not any(s.correct) for s in summaries),
        reward_mean=sum(rewards) / len(rewards),
        correct_fraction=sum(correct) / len(correct),
        truncated_fraction=sum(status.is_truncated for status in statuses) / len(statuses),
        failed=statuses.count(Status.FAILED),
        ungraded=sum(not graded for s in summaries for graded in s.graded),
        length_mean=sum(lengths) / len(lengths),
        length_max=max(lengths),
        tokens_sampled=sum(lengths),
        reflections_mean=sum(n for s in summaries for n in s.reflections) / len(rewards),
        by_source={source: _source_stats(summaries, source) for source in sorted({s.source for s in summaries})},
        inexact=statuses.count(Status.INEXACT),
        tools=_tool_stats([counts for s in summaries for counts in s.episodes]),
    )


def _tool_stats(episodes: Sequence[EpisodeCounts]) -> ToolStats:
    n, calls = max(1, len(episodes)), sum(e.calls for e in episodes)
    return ToolStats(
        turns=sum(e.turns for e in episodes) / n,
        calls=calls / n,
        call_errors=sum(e.call_errors for e in episodes) / max(1, calls),
        seconds=sum(e.tool_seconds for e in episodes) / n,
        seconds_max=max((e.tool_seconds for e in episodes), default=0.0),
        observation_tokens=sum(e.observation_tokens for e in episodes) / n,
        void=sum(e.void for e in episodes) / n,
    )


def _source_stats(summaries: list[GroupSummary], source: str) -> SourceStats:
    rewards = [reward for s in summaries if s.source == source for reward in s.rewards]
    correct = [c for s in summaries if s.source == source for c in s.correct]
    return SourceStats(len(rewards), sum(rewards) / len(rewards), sum(correct) / len(correct))
