"""How long prompts and responses are: assumed, or as a run's metrics say."""

from __future__ import annotations

import functools
import heapq
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.console import mean

_SPREAD = 0.7  # of a log-normal distribution of responses, in its exponent
_WIDEST = 3.0
_MOST = 2**13  # samples that stand for all of a step
_NEWEST = 10  # steps of a run that are looked at
# Of the limits, where nothing else is known.
_PROMPT_SHARE, _RESPONSE_SHARE = 0.25, 0.5


@dataclass(frozen=True)
class Lengths:
    """Tokens: `prompt`, the mean; `responses`, of one step's samples, each of which stands for `weight` of them.
    `source`: where they come from, in words."""

    prompt: float
    responses: tuple[int, ...]
    source: str
    weight: float = 1.0

    @functools.cached_property
    def response(self) -> float:
        """The mean."""
        return statistics.fmean(self.responses)

    @functools.cached_property
    def sequences(self) -> list[int]:
        """Prompt and response of each sample."""
        return [round(self.prompt) + n for n in self.responses]

    @functools.cached_property
    def mean_square(self) -> float:
        """Sum of the squares of the sequences' lengths by the sum of their lengths."""
        return sum(n * n for n in self.sequences) / sum(self.sequences)

    @property
    def action_share(self) -> float:
        """Tokens that carry a loss, of all."""
        return self.response / (self.response + self.prompt)


def assumed(count: int, *, longest: int, longest_prompt: int, response: float = 0.0, prompt: float = 0.0) -> Lengths:
    """Log-normal responses of a given mean, cut off at `longest`; 0: half of it, and a quarter of the prompts'
    limit."""
    response = min(response or longest * _RESPONSE_SHARE, longest)
    prompt = min(prompt or longest_prompt * _PROMPT_SHARE, longest_prompt)
    lengths = log_normal(min(count, _MOST), response, longest, _SPREAD)
    source = f"assumed: log-normal, mean {response:,.0f}, cut at {longest:,}"
    return Lengths(prompt, lengths, source, count / len(lengths))


def of_run(folder: Path, count: int, *, longest: int, longest_prompt: int) -> Lengths:
    """As the newest steps of a run sampled: their mean, and a spread whose longest of `count` is theirs.

    Raises:
        UserError: no metrics there, or none of lengths.
    """
    rows = jsonl.read_steps(folder / jsonl.FILE)[-_NEWEST:]
    response, most = mean(rows, "response/length_mean"), mean(rows, "response/length_max")
    if not response >= 1:
        raise UserError(f"--lengths {folder}: its metrics have no response/length_mean; name the folder of a run")
    samples = min(count, _MOST)
    low, high = 0.0, _WIDEST
    for _ in range(30):
        spread = (low + high) / 2
        low, high = (spread, high) if log_normal(samples, response, longest, spread)[-1] < most else (low, spread)
    source = f"{folder}: mean {response:,.0f}, longest {most:,.0f} in the newest {len(rows)} steps"
    prompt = longest_prompt * _PROMPT_SHARE
    return Lengths(prompt, log_normal(samples, response, longest, high), source, count / samples)


def log_normal(count: int, average: float, longest: int, spread: float) -> tuple[int, ...]:
    """`count` quantiles, ascending, of a log-normal distribution cut off at `longest` and of this mean then. Tokens."""
    normal = statistics.NormalDist()
    scores = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    shapes = [math.exp(spread * z) for z in scores]
    low, high = 0.0, float(longest)
    while sum(min(high * x, longest) for x in shapes) < average * count * 0.9999 and high < longest * 1e6:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        small = sum(min(middle * x, longest) for x in shapes) < average * count
        low, high = (middle, high) if small else (low, middle)
    return tuple(max(1, round(min(high * x, longest))) for x in shapes)


def micro_batches(sequences: Sequence[int], budget: int) -> list[int]:
    """Tokens of each micro-batch of a rank: first fit, longest first, as `data.packing` packs them."""
    loads: list[int] = []
    least = min(sequences, default=0)
    open_: list[int] = []  # micro-batches with room for the shortest sequence
    for n in sorted(sequences, reverse=True):
        at = next((i for i in open_ if loads[i] + n <= budget), None)
        if at is None:
            at = len(loads)
            loads.append(0)
            open_.append(at)
        loads[at] += n  # beyond the budget: alone
        if loads[at] + least > budget:
            open_.remove(at)
    return loads


def deal(sequences: Sequence[int], ranks: int) -> list[int]:
    """The sequences of the rank with the most tokens of `ranks`, dealt longest first to the one with the fewest."""
    if ranks == 1:
        return list(sequences)
    heap = [(0, rank) for rank in range(ranks)]
    given: list[list[int]] = [[] for _ in range(ranks)]
    for n in sorted(sequences, reverse=True):
        load, rank = heapq.heappop(heap)
        given[rank].append(n)
        heapq.heappush(heap, (load + n, rank))
    return max(given, key=sum)
