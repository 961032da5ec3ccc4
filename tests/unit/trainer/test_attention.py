"""What attention over a pack costs beside attention itself: linear in the sequences, with and without CP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stare_megatron.trainer import attention

HEADS, GROUPS, DIM = 2, 1, 4
LENGTHS = (4, 8, 40, 12, 4, 100, 16, 8)  # in several batches


class Elements(TorchDispatchMode):
    """Counts the elements of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outs = out if isinstance(out, tuple | list) else (out,)
        if not any(r.alias_info for r in func._schema.returns):  # views cost nothing
            self.count += sum(x.numel() for x in outs if isinstance(x, torch.Tensor))
        return out


class SecondOf2:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    return attention.packed(q, k, v, lengths, 0.5)


def shared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    return attention.packed_context_parallel(q, k, v, lengths, 0.5, SecondOf2())  # type: ignore[arg-type]


def elements(run: Callable[..., torch.Tensor], lengths: tuple[int, ...], tokens: int) -> int:
    qkv = [torch.randn(tokens, heads, DIM, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]
    run(*qkv, lengths)  # plans are made once
    with Elements() as seen:
        run(*qkv, lengths).sum().backward()
    return seen.count


@pytest.mark.parametrize(("run", "size"), [(alone, 1), (shared, 2)], ids=["alone", "CP"])
def test_four_times_the_sequences_cost_four_times_as_much(monkeypatch, run, size):
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda x, group: torch.cat([x, x]))
    few, many = LENGTHS * 4, LENGTHS * 16
    assert elements(run, many, sum(many) // size) <= 4.01 * elements(run, few, sum(few) // size)


@pytest.mark.parametrize("repeats", [1, 3])
def test_more_kinds_of_lengths_cost_no_more_for_each_token(repeats):
    """One gather for all batches: a gradient of the whole pack for each batch would show here."""
    lengths = tuple(4 << i for i in range(8)) * repeats
    one_batch = (64,) * (sum(lengths) // 64) + (sum(lengths) % 64,)
    mixed, plain = (elements(alone, own, sum(lengths)) for own in (lengths, one_batch))
    assert mixed < 1.5 * plain


def test_a_pack_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        alone(torch.zeros(0, HEADS, DIM), torch.zeros(0, GROUPS, DIM), torch.zeros(0, GROUPS, DIM), (0, 0))
