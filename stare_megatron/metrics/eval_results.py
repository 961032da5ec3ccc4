"""What an evaluation found: the numbers of a benchmark, whole and by source, from the numbers of its groups."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.metrics.catalogue import Metric, member, metrics
from stare_megatron.metrics.estimators import Estimate, estimate, pass_at_k, powers_of_two
from stare_megatron.types import GroupSummary, Status

WHOLE = ""  # the source of a result over all sources


@dataclass(frozen=True)
class Responses:
    """Counts over the responses of one setting, all prompts together. Means are NaN without responses.

    `length_mean`: action tokens; `truncated`: share; `reflections`: words a response; `ungraded`: responses without a
    grade, `failed` ones among them; `tokens`: action tokens.
    """

    count: int
    length_mean: float
    truncated: float
    reflections: float
    ungraded: int
    failed: int
    tokens: int


@dataclass(frozen=True)
class Result:
    """One benchmark, or one source of it.

    `avg`: accuracy over k samples a prompt; `passes`: k' -> pass@k'; `greedy`: accuracy of greedy decoding, without
    prompts when that was not asked for. Responses without a grade are in no accuracy: a prompt counts with those of its
    samples that have one, and not at all without any (`Estimate.prompts` says how many count). `distinct_correct`:
    different token sequences among a prompt's correct samples, mean over prompts.
    """

    benchmark: str
    source: str
    k: int
    prompts: int
    avg: Estimate
    passes: Mapping[int, Estimate]
    greedy: Estimate
    distinct_correct: float
    sampled: Responses
    greedily: Responses


def result(
    benchmark: str,
    source: str,
    k: int,
    sampled: Sequence[GroupSummary],
    greedily: Sequence[GroupSummary],
    confidence: float,
) -> Result:
    """Sum up the groups of one benchmark: `sampled` of k samples, `greedily` of one (empty: not asked for)."""
    graded = [(sum(s.graded), sum(s.correct)) for s in sampled]
    passes = {
        draws: estimate([pass_at_k(n, c, draws) for n, c in graded if n >= draws], confidence)
        for draws in powers_of_two(k)
    }
    return Result(
        benchmark=benchmark,
        source=source,
        k=k,
        prompts=len(sampled),
        avg=estimate([c / n for n, c in graded if n], confidence),
        passes=passes,
        greedy=estimate([float(s.correct[0]) for s in greedily if s.graded[0]], confidence),
        distinct_correct=_mean([s.distinct_correct for s in sampled]),
        sampled=_responses(sampled),
        greedily=_responses(greedily),
    )


def result_metrics(results: Sequence[Result], seconds: float) -> tuple[Metric, ...]:
    """An evaluation as the metrics of the catalogue; sources only where a benchmark has several."""
    values: dict[str, float] = {}
    whole = [r for r in results if r.source == WHOLE]
    for r in whole:
        values |= _whole(r)
        sources = [part for part in results if part.benchmark == r.benchmark and part.source != WHOLE]
        for part in sources if len(sources) > 1 else ():
            values |= _source(part)
    values["eval/avg"] = _mean([r.avg.value for r in whole])
    if any(r.greedily.count for r in whole):
        values["eval/greedy"] = _mean([r.greedy.value for r in whole])
    values["eval/tokens"] = sum(r.sampled.tokens + r.greedily.tokens for r in whole)
    values["eval/seconds"] = seconds
    return metrics(values)


def _whole(r: Result) -> dict[str, float]:
    def name(quantity: str, **parts: int) -> str:
        return member(f"eval/{{benchmark}}/{quantity}", benchmark=r.benchmark, **parts)

    def with_interval(quantity: str, e: Estimate, **parts: int) -> dict[str, float]:
        ends = {name(f"{quantity}/ci_low", **parts): e.low, name(f"{quantity}/ci_high", **parts): e.high}
        return {name(quantity, **parts): e.value} | ends

    values = with_interval("avg@{k}", r.avg, k=r.k)
    for draws, estimated in r.passes.items():
        values |= with_interval("pass@{k}", estimated, k=draws)
    if r.greedily.count:
        values |= with_interval("greedy", r.greedy)
        values[name("greedy_length_mean")] = r.greedily.length_mean
        values[name("greedy_truncated")] = r.greedily.truncated
    return values | {
        name("length_mean"): r.sampled.length_mean,
        name("truncated"): r.sampled.truncated,
        name("distinct_correct"): r.distinct_correct,
        name("reflections"): r.sampled.reflections,
        name("ungraded"): r.sampled.ungraded + r.greedily.ungraded,
        name("failed"): r.sampled.failed + r.greedily.failed,
    }


def _source(r: Result) -> dict[str, float]:
    def name(quantity: str, **parts: int) -> str:
        return member(f"eval/{{benchmark}}/{{source}}/{quantity}", benchmark=r.benchmark, source=r.source, **parts)

    values = {name("avg@{k}", k=r.k): r.avg.value}
    values |= {name("pass@{k}", k=draws): estimated.value for draws, estimated in r.passes.items()}
    return values | ({name("greedy"): r.greedy.value} if r.greedily.count else {})


def text(results: Iterable[Result]) -> list[str]:
    """A line a benchmark."""
    lines = []
    for r in results:
        if r.source != WHOLE:
            continue
        largest = max(r.passes)
        line = f"{r.benchmark}  avg@{r.k} {_shown(r.avg)}  pass@{largest} {_shown(r.passes[largest])}"
        if r.greedily.count:
            line += f"  greedy {_shown(r.greedy)}"
        line += f"  length {r.sampled.length_mean:.1f}  truncated {r.sampled.truncated:.0%}"
        ungraded = r.sampled.ungraded + r.greedily.ungraded
        lines.append(line + (f"  {ungraded} not graded" if ungraded else ""))
    return lines


def _shown(e: Estimate) -> str:
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _responses(summaries: Sequence[GroupSummary]) -> Responses:
    lengths = [n for s in summaries for n in s.num_action_tokens]
    statuses = [status for s in summaries for status in s.statuses]
    return Responses(
        count=len(lengths),
        length_mean=_mean(lengths),
        truncated=_mean([status.is_truncated for status in statuses]),
        reflections=_mean([n for s in summaries for n in s.reflections]),
        ungraded=sum(not graded for s in summaries for graded in s.graded),
        failed=statuses.count(Status.FAILED),
        tokens=sum(lengths),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
