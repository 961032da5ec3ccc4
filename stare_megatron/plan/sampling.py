"""Seconds of a rollout: an engine's decoding simulated from one finished sequence to the next, tail included.

A step of the engine reads its weights and the keys and values of the running sequences, or computes their products,
whichever takes longer, and costs the host and the messages between its ranks a constant beside.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stare_megatron.config import Config
from stare_megatron.models.layout import element_bytes
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.lengths import Lengths
from stare_megatron.plan.memory import EngineRoom
from stare_megatron.plan.timing import Machine
from stare_megatron.plan.work import work_of

_LATENCY = 10e-6  # of one small all-reduce, seconds
_MOST = 2**12  # sequences of an engine that are simulated; of more, these stand for all
_TAIL = 0.25  # of the most that ran at once


@dataclass(frozen=True)
class Engine:
    """One engine of a run. `running`: sequences at a time."""

    config: Config
    shape: ModelShape
    machine: Machine
    room: EngineRoom
    running: int

    def step(self, sequences: int, context: float) -> tuple[float, float, float]:
        """Seconds that `sequences` with `context` tokens in all take for one token each: of memory, of products, and
        beside both."""
        m, tp, shape = self.machine, self.config.inference.tensor_parallel, self.shape
        read = self.room.weights
        if shape.experts is not None:
            e = shape.experts
            experts = 3 * shape.layers * e.number * e.ffn * shape.hidden
            byte = element_bytes(self.config.model.dtype)
            untouched = (1 - e.top_k / e.number) ** sequences
            read -= experts * byte / tp * untouched
        work = work_of(shape)
        products = sequences * (work.layers * work.layer + work.head) / tp / m.gemm
        beside = self.overhead + (2 * shape.layers * _LATENCY if tp > 1 else 0.0)
        return (read + context * self.room.token) / m.memory, products, beside

    @property
    def overhead(self) -> float:
        """Seconds of a step beside its kernels, in which the host launches one by one what no CUDA graph holds."""
        c, eager = self.machine.constants, self.config.inference.vllm.get("enforce_eager", False)
        return c.decode_step + (self.shape.layers * c.eager_layer if eager else 0.0)

    def prefill(self, tokens: float) -> float:
        """Seconds of reading prompts of so many tokens in all."""
        work = work_of(self.shape)
        return work.layers * work.layer * tokens / self.config.inference.tensor_parallel / self.machine.gemm


@dataclass(frozen=True)
class RolloutTime:
    """Of a step, its refills included. `tokens`: sampled by all engines; `tail`: share of the seconds in which less
    than a quarter of the most that ran was running; `bound`: what took most, in words; `refills`: groups sampled in the
    place of dropped ones."""

    seconds: float
    tokens: int
    tail: float
    bound: str
    refills: int


def rollout_time(engine: Engine, lengths: Lengths, kept_share: float) -> RolloutTime:
    """`kept_share`: groups that dynamic sampling keeps. `lengths`: of one step's samples; further ones are alike."""
    r, engines = engine.config.rollout, engine.config.inference.engines
    groups = r.prompts_per_step
    if r.dynamic_sampling:
        groups = min(math.ceil(groups / kept_share), groups * (1 + r.max_refills))
    wanted, refills = groups * r.group_size, groups - r.prompts_per_step
    tokens = round(wanted * lengths.response)
    # A refill takes the place of a group that ended: no more than a batch is sampled at a time.
    at_once = math.ceil(r.prompts_per_step * r.group_size / engines)
    engine = dataclasses.replace(engine, running=min(engine.running, at_once))
    if engine.running < 1:
        return RolloutTime(math.inf, tokens, 0.0, "no room for a sequence", refills)
    # The engine that has the longest sequence ends last.
    share = math.ceil(wanted / engines)
    count, descending = min(share, _MOST), sorted(lengths.responses, reverse=True)
    mine = [descending[i * len(descending) // count] for i in range(count)]
    unique = math.ceil(share / r.group_size)  # the prefix cache reads a group's prompt once
    prefill = engine.prefill(unique * lengths.prompt)
    seconds, tail, by_memory = decode(engine, _spread(mine), lengths.prompt)
    whole = seconds * share / count + prefill
    bound = "reading weights and KV" if by_memory > 0.5 else "matrix products"
    if engine.overhead * max(mine) > 0.5 * whole:
        bound = "the engine's steps beside its kernels"
    if tail > 0.3 * seconds:
        bound += f", {tail / seconds:.0%} of it for the longest sequences"
    return RolloutTime(whole, tokens, tail / seconds, bound, refills)


def _spread(lengths: Sequence[int]) -> list[int]:
    """The same in an order in which long and short ones mix, always the same."""
    stride = next(n for n in (7919, 7907, 7901, 7883) if math.gcd(n, len(lengths)) == 1)
    return [lengths[i * stride % len(lengths)] for i in range(len(lengths))]


def decode(engine: Engine, responses: Sequence[int], prompt: float) -> tuple[float, float, float]:
    """Seconds, those of the tail, and the share of steps that memory bounds. Sequences are admitted in their order as
    others end."""
    most, waiting = min(engine.running, len(responses)), list(reversed(responses))
    done, seconds, tail, by_memory, context = 0, 0.0, 0.0, 0.0, 0.0
    running: list[tuple[int, int]] = []  # the step at which each ends, and its length
    while waiting or running:
        while waiting and len(running) < most:
            length = waiting.pop()
            heapq.heappush(running, (done + length, length))
            context += prompt
        end = running[0][0]
        steps, count = end - done, len(running)
        memory, products, beside = engine.step(count, context + count * steps / 2)
        spent = steps * (max(memory, products) + beside)
        seconds += spent
        by_memory += spent * (memory >= products)
        tail += spent * (count < _TAIL * most and not waiting)
        context += count * steps
        done = end
        while running and running[0][0] == done:
            context -= heapq.heappop(running)[1] + prompt
    return seconds, tail, by_memory / seconds
