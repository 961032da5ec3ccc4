"""Exact top-P% of two subsets of tokens that are spread across ranks.

Every token has a 64-bit key: the order-preserving bits of its fp32 surprisal, then a bijective 32-bit hash of its
global id, so that equal surprisals favour no position and the order does not depend on the sharding. The k-th largest
key is found by radix descent: six rounds over digits of 11, 11, 10 bits, twice; each round is one int64 all-reduce of
the histograms of both subsets. Shapes are fixed and nothing is read back to the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from stare_megatron.algo.comm import Comm

POSITIVE, NEGATIVE, NEITHER = 0, 1, 2  # subset codes

_MASK = 0xFFFFFFFF
_BINS = 2048
_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of a 32-bit word, from the top


@dataclass(frozen=True, eq=False)
class Selection:
    """What `select_top` chose.

    `selected_T` bool: the token is among the k largest of its subset. `count_S`, `selected_S` int64 [2]: tokens and
    chosen tokens of the POSITIVE and NEGATIVE subset over all ranks; `nan` int64 []: tokens left out as NaN.
    """

    selected_T: torch.Tensor
    count_S: torch.Tensor
    selected_S: torch.Tensor
    nan: torch.Tensor

    def split(self, sizes: Sequence[int]) -> list[Selection]:
        """By consecutive runs of tokens; the counts stay those of the whole."""
        return [dataclasses.replace(self, selected_T=part) for part in self.selected_T.split(list(sizes))]


def top_count(fraction: float, n: torch.Tensor) -> torch.Tensor:
    """ceil(fraction x n) in exact arithmetic, int64: 0.07 of 100 is 7 although 0.07 * 100 > 7 in floating point.

    `fraction` is read as the decimal it is written as; decimals of more than nine digits as the nearest ratio with a
    denominator up to 10^9.
    """
    exact = Fraction(repr(fraction)).limit_denominator(10**9)
    return (n * exact.numerator + exact.denominator - 1) // exact.denominator


def order_key(x_T: torch.Tensor) -> torch.Tensor:
    """Map fp32 to int64 in [0, 2^32) that compares like the numbers; -0 equals +0. The caller handles NaN."""
    x_T = torch.where(x_T == 0, 0.0, x_T.float())
    bits_T = x_T.view(torch.int32).to(torch.int64) & _MASK
    return torch.where(bits_T >= 1 << 31, bits_T ^ _MASK, bits_T | (1 << 31))


def hash32(id_T: torch.Tensor) -> torch.Tensor:
    """A bijection of [0, 2^32), int64: the "lowbias32" mixer (xor-shift, multiply by an odd constant, repeat)."""
    x_T = id_T & _MASK
    x_T = ((x_T ^ (x_T >> 16)) * 0x7FEB352D) & _MASK
    x_T = ((x_T ^ (x_T >> 15)) * 0x846CA68B) & _MASK
    return x_T ^ (x_T >> 16)


def subset_codes(advantage_T: torch.Tensor, action_T: torch.Tensor) -> torch.Tensor:
    """POSITIVE where A > 0, NEGATIVE where A < 0, NEITHER for A = 0 and for tokens that are no action; int64 [T]."""
    code_T = torch.full_like(advantage_T, NEITHER, dtype=torch.int64)
    code_T = torch.where(action_T & (advantage_T > 0), POSITIVE, code_T)
    return torch.where(action_T & (advantage_T < 0), NEGATIVE, code_T)


def select_top(
    value_T: torch.Tensor, subset_T: torch.Tensor, global_id_T: torch.Tensor, fraction: float, comm: Comm
) -> Selection:
    """The ceil(fraction x n) largest values of each of the two subsets, over all ranks of `comm`.

    Args:
        value_T: this rank's values (surprisals), any float dtype, compared as fp32.
        subset_T: int64 codes POSITIVE, NEGATIVE or NEITHER.
        global_id_T: int64 in [0, 2^32), unique over all ranks; breaks ties.
        fraction: P in [0, 1].
    """
    return select_some(value_T, subset_T, global_id_T, lambda count_S: top_count(fraction, count_S), comm)


def select_some(
    value_T: torch.Tensor,
    subset_T: torch.Tensor,
    global_id_T: torch.Tensor,
    wanted: Callable[[torch.Tensor], torch.Tensor],
    comm: Comm,
) -> Selection:
    """As `select_top`, but `wanted(tokens in each subset, int64 [2])` says how many of each, int64 [2], at most all."""
    value_T = value_T.detach().float()
    nan_T = torch.isnan(value_T) & (subset_T != NEITHER)
    row_T = torch.where(nan_T, NEITHER, subset_T)
    words = (order_key(torch.where(nan_T, 0.0, value_T)), hash32(global_id_T))
    zeros = torch.zeros(3, dtype=torch.int64, device=value_T.device)  # one entry a row; row 2 takes no part
    kth = (zeros.clone(), zeros.clone())  # the k-th key of each subset, found digit by digit
    count_S = wanted_S = left_S = zeros[:2]
    nan = nan_T.sum()
    open_T = row_T != NEITHER  # agrees with the k-th key so far
    for i, (word, shift, bits) in enumerate((w, *digit) for w in (0, 1) for digit in _DIGITS):
        digit_T = (words[word] >> shift) & ((1 << bits) - 1)
        in_bin_SB, nan_all = _histograms(digit_T, row_T, open_T, nan, comm)
        if i == 0:
            count_S, nan = in_bin_SB.sum(1), nan_all
            wanted_S = left_S = wanted(count_S)
        from_top_SB = in_bin_SB.flip(1).cumsum(1).flip(1)  # tokens in this bin and above
        bin_S1 = ((from_top_SB >= left_S[:, None]).sum(1, keepdim=True) - 1).clamp(min=0)
        left_S = left_S - (from_top_SB - in_bin_SB).gather(1, bin_S1)[:, 0]
        digit_of_row = torch.cat([bin_S1[:, 0], zeros[2:]])
        kth[word].add_(digit_of_row << shift)
        open_T = open_T & (digit_T == digit_of_row[row_T])

    value_kth_T, hash_kth_T = kth[0][row_T], kth[1][row_T]
    taken_T = (words[0] > value_kth_T) | ((words[0] == value_kth_T) & (words[1] >= hash_kth_T))
    some_of_row = torch.cat([wanted_S, zeros[2:]]) > 0
    return Selection(taken_T & some_of_row[row_T], count_S, wanted_S, nan)


def _histograms(
    digit_T: torch.Tensor, row_T: torch.Tensor, open_T: torch.Tensor, nan: torch.Tensor, comm: Comm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed over ranks in one all-reduce: open tokens of each subset by digit, int64 [2, 2048]; number of NaNs."""
    size = NEITHER * _BINS
    flat = torch.zeros(size + 1, dtype=torch.int64, device=digit_T.device)
    flat.scatter_add_(0, torch.where(open_T, row_T * _BINS + digit_T, size), torch.ones_like(digit_T))
    flat[size] = nan  # what the closed tokens left there means nothing
    flat = comm.sum(flat)
    return flat[:size].view(2, _BINS), flat[size].clone()
