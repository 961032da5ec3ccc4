"""Do engine and trainer have the same weights? Log-probs of a probe prompt say whether, checksums say which.

A checksum is the sum over a parameter's elements of h(position) x bits mod 2^64: it depends on every bit and every
position, is the same in any order and on any device, and adds over tensor-parallel shards without gathering them.
Bits are those of the float32 value (exact for bfloat16); -0 counts as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from stare_megatron.errors import RunError

_CHUNK = 1 << 20  # elements hashed at a time: bounds the temporaries to some 30 MB
_MASK = (1 << 64) - 1


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


def first_difference(trainer: Mapping[str, str], engine: Mapping[str, str]) -> str | None:
    """The first parameter, in the trainer's order, whose checksums differ; then one that only the engine reports
    (an LM head that does not equal the embedding it is tied to); None if all agree. Parameters that the engine does
    not report are not compared."""
    for name, value in trainer.items():
        if name in engine and engine[name] != value:
            return name
    return next((name for name in engine if name not in trainer), None)


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
    """Stop the run if the mean difference exceeds `threshold` or is NaN.

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
        f"{agreement.mean:.3g} (max {agreement.max:.3g}) > sync.probe_threshold {threshold:g}; {cause}"
    )
