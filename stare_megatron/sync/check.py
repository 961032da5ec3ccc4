"""Do engine and trainer have the same weights? Log-probs of a probe prompt say whether, checksums say which.

In low precision honest log-probs differ by more than some faults make them differ, and in any precision a prompt may
miss a fault: an expert's matrix moves few tokens. So checksums are compared after each push, and log-probs say whether
the two compute the same with the same weights.

A checksum is the sum over a parameter's elements of h(position) x bits mod 2^64: it depends on every bit and every
position, is the same in any order and on any device, and adds over tensor-parallel shards without gathering them.
Bits are those of the float32 value (exact for bfloat16); -0 counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.models.hf_folder import grouped
from stare_megatron.sync.source import ParamSpec

_EXPERTS = ".experts."  # between a layer and its experts' numbers, in names
_CHUNK = 1 << 20  # elements hashed at a time: bounds the temporaries to some 30 MB
_MASK = (1 << 64) - 1
# Elements whose checksums are compared after a push: well under a second on a GPU; one or two on a core of a CPU, where
# an engine multiplies to see what it has packed (`sync.loaded.used_weight`).
_SHARE = 1 << 28
_CPU_SHARE = 1 << 25

PRECISE = "float32"
# Largest mean |log-prob difference|, nats, of an engine and a trainer with the same weights, by model.dtype. The most
# measured in bfloat16 was 0.04; float16 has three more bits.
BOUNDS = {PRECISE: 1e-3, "bfloat16": 0.1, "float16": 0.0125}


def checksum(tensor: torch.Tensor) -> str:
    """Checksum of a whole parameter, 16 hexadecimal digits."""
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)
    return f"{shard_sum(rows, 0, 0, rows.shape[1]):016x}"


def shard_sum(part: torch.Tensor, row: int, column: int, width: int) -> int:
    """Share of a parameter's checksum, an integer mod 2^64.

    Args:
        part: [rows, columns], a block of the parameter seen as a matrix.
        row, column: the block's place in it.
        width: columns of the whole parameter.
    """
    total = 0
    step = max(1, _CHUNK // max(1, part.shape[1]))
    columns = torch.arange(column, column + part.shape[1], device=part.device)
    for begin in range(0, part.shape[0], step):
        block = part[begin : begin + step].detach()
        rows = torch.arange(row + begin, row + begin + block.shape[0], device=part.device)
        bits = (block.to(torch.float32) + 0.0).contiguous().view(torch.int32).to(torch.int64)
        total += int((_mix(rows[:, None] * width + columns) * bits).sum())
    return total & _MASK


def box_sum(value: torch.Tensor, box: Box, shape: Sequence[int]) -> int:
    """Share of `box` in the checksum of a parameter of shape `shape`: it depends on what is in the box and on where in
    the parameter that belongs.

    Args:
        value: of the box's shape.
    """
    width = math.prod(shape[1:])
    column = box.begin[1] if len(shape) > 1 else 0
    return shard_sum(value.reshape(value.shape[0], -1), box.begin[0], column, width)


def _mix(position: torch.Tensor) -> torch.Tensor:
    """An odd pseudo-random int64 for each position (the steps of splitmix64; integer arithmetic wraps)."""
    z = position * -7046029254386353131 + 1
    z = (z ^ (z >> 30)) * -4658895280553007687
    z = (z ^ (z >> 27)) * -7723592293110705685
    return (z ^ (z >> 31)) | 1


def merge_shards(workers: Iterable[Mapping[str, tuple[int, int]]]) -> dict[str, str]:
    """Checksums of whole parameters from what each engine worker has.

    Args:
        workers: for each worker, parameter name -> (shard index, `shard_sum`). Workers that hold the
            same shard (replicated norms, KV heads) must agree; a parameter on which they do not gets a value that
            equals no checksum.
    """
    shards: dict[str, dict[int, int]] = {}
    torn: set[str] = set()
    for worker in workers:
        for name, (shard, value) in worker.items():
            if shards.setdefault(name, {}).setdefault(shard, value) != value:
                torn.add(name)
    return {
        name: "workers disagree" if name in torn else f"{sum(parts.values()) & _MASK:016x}"
        for name, parts in shards.items()
    }


def added(ranks: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Checksums from the shares of several ranks."""
    total: dict[str, int] = {}
    for shares in ranks:
        for name, value in shares.items():
            total[name] = total.get(name, 0) + int(value, 16)
    return {name: f"{value & _MASK:016x}" for name, value in total.items()}


def first_difference(trainer: Mapping[str, str], engine: Mapping[str, str]) -> str | None:
    """The first parameter, in the trainer's order, whose checksums differ, or that the engine lacks though it has what
    belongs to it: a bias whose weight it has, a matrix of an expert of a layer of whose experts it has others; then one
    that only the engine reports (an LM head that does not equal the embedding it is tied to); None if all agree. Other
    parameters that the engine does not report are not compared."""
    layers = {name.partition(_EXPERTS)[0] for name in engine if _EXPERTS in name}
    for name, value in trainer.items():
        module, _, kind = name.rpartition(".")
        if name not in engine:
            if (kind == "bias" and f"{module}.weight" in engine) or name.partition(_EXPERTS)[0] in layers:
                return name
        elif engine[name] != value:
            return name
    return next((name for name in engine if name not in trainer), None)


def share(specs: Sequence[ParamSpec], turn: int, *, on_cpu: bool = False) -> frozenset[str]:
    """Names of the parameters whose checksums are compared at the probe that is number `turn`: the whole of a small
    model; of a large one so many as take no time worth mentioning, others each time, so that all have their turn.
    `on_cpu`: fewer."""
    turns = grouped(specs, lambda spec: math.prod(spec.shape), _CPU_SHARE if on_cpu else _SHARE)
    return frozenset(spec.name for spec in turns[turn % len(turns)])


def expected(dtype: str, baseline: float) -> float:
    """Up to which mean |log-prob difference|, nats, engine and trainer are as near as they were. `baseline`: what was
    measured when they were known to have the same weights; 0: never was."""
    bound = BOUNDS[dtype]
    return min(bound, 3 * baseline + bound / 10) if baseline else bound


@dataclass(frozen=True)
class Agreement:
    """|engine log-prob - trainer log-prob| over the probe prompt, nats; `worst` is the index of the largest."""

    mean: float
    max: float
    worst: int


def compare(engine: npt.NDArray[np.float32], trainer: npt.NDArray[np.float32]) -> Agreement:
    """Compare log-probs of the same tokens, float32 [n]; NaN anywhere makes the mean NaN."""
    if engine.shape != trainer.shape or not engine.size:
        raise ValueError(f"log-probs of shapes {engine.shape} (engine) and {trainer.shape} (trainer)")
    gap = np.abs(engine.astype(np.float64) - trainer.astype(np.float64))
    return Agreement(float(gap.mean()), float(gap.max()), int(gap.argmax()))


def require_agreement(
    engine: str, version: int, agreement: Agreement, threshold: float, difference: Callable[[], str | None]
) -> None:
    """Stop the run if the mean difference exceeds `threshold`, `sync.probe_threshold` or what the dtype makes of it, or
    is NaN.

    Args:
        engine: the engine's name.
        version: weight version probed.
        difference: compares checksums and names the first parameter that differs; called only on a breach.

    Raises:
        RunError: with the difference, the threshold and the parameter.
    """
    if agreement.mean <= threshold:
        return
    name = difference()
    cause = (
        f"the first parameter whose checksum differs is {name!r}"
        if name is not None
        else "the checksums of all parameters agree, so the two compute differently with the same weights"
    )
    raise RunError(
        f"{engine} disagrees with the trainer after the push of version {version}: mean |log-prob difference| "
        f"{agreement.mean:.3g} (max {agreement.max:.3g}) > {threshold:g} (sync.probe_threshold); {cause}"
    )


def require_own_cache(engine: str, version: int, gap: float, threshold: float) -> None:
    """Stop the run if a token drawn after a prefix has another log-prob than the same token of a prompt. `gap`: as of
    `inference.engine.Engine.cache_gap`, nats; of a single token, so that ten times the `threshold` of a mean is let by.

    Raises:
        RunError: with the gap.
    """
    if not gap <= 10 * threshold:
        raise RunError(
            f"{engine} draws after prefixes that other weights than those of version {version} computed: a log-prob is "
            f"off by {gap:.3g} nats; set inference.vllm.enable_prefix_caching = false, and report it"
        )


def require_same(engine: str, version: int, name: str | None) -> None:
    """Stop the run if the engine has other weights than the trainer. `name`: of the first parameter that differs.

    Raises:
        RunError: names it.
    """
    if name is not None:
        raise RunError(
            f"{engine} has other weights than the trainer after the push of version {version}: the first parameter "
            f"whose checksum differs is {name!r}"
        )
