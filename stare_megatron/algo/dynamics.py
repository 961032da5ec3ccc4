"""How an update is expected to move the policy's entropy, token by token, to first order.

A policy-gradient step of size eta on the logits of a token with advantage A and loss weight w changes the entropy of
its distribution by dH = -eta w A S (S: entropy sensitivity, `trainer.partials`). S changes sign at the token's critical
surprisal s* = H - W0(B e^H), B = p_y (H - s_y) - S, W0 Lambert's function: above it a token is unlikely enough for a
positive advantage to raise the entropy. The signs of A and S make four quadrants. Sums are int64, hence the same for
every layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stare_megatron.algo.comm import Comm
from stare_megatron.algo.reduce import fixed_point_sum, from_fixed_point
from stare_megatron.algo.selection import select_top, subset_codes
from stare_megatron.algo.stare import UNLIKELY, ScoredCandidates, criticality
from stare_megatron.types import QUADRANTS, EntropyForces, Measured

_HALLEY_STEPS = 8


@dataclass(frozen=True, eq=False)
class Applied:
    """What an update did with its tokens, [T]: `weight_T` factor of the loss; `selected_T` bool: in L+ or L-."""

    weight_T: torch.Tensor
    selected_T: torch.Tensor


def exact_set(tokens: ScoredCandidates, fraction: float, comm: Comm) -> torch.Tensor:
    """bool [T]: what the selector `sensitivity` would choose. A collective."""
    subset_T = subset_codes(tokens.advantage_T, tokens.action_T)
    key_T = criticality(tokens, "sensitivity")
    return select_top(key_T, subset_T, tokens.global_id_T, fraction, comm).selected_T


def measure_forces(tokens: ScoredCandidates, chosen_T: torch.Tensor, comm: Comm) -> torch.Tensor:
    """Sums over the action tokens of all ranks for `forces`, int64 [5]. A collective."""
    own_T = tokens.action_T
    advantage_T, chosen_T = tokens.advantage_T[own_T].double(), chosen_T[own_T]
    change_T = -advantage_T * tokens.sensitivity_T[own_T].double()
    parts = (change_T, change_T[chosen_T & (advantage_T > 0)], change_T[chosen_T & (advantage_T < 0)])
    sums = [fixed_point_sum(x) for x in parts]
    return comm.sum(torch.stack([own_T.sum(), torch.stack([s[1] for s in sums]).sum(), *(s[0] for s in sums)]))


def forces(totals: list[int]) -> EntropyForces:
    """What `measure_forces` returned, per action token. Tokens that are not finite take no part, as in the metrics."""
    tokens, _, *parts = totals
    return EntropyForces(*(from_fixed_point(n) / max(tokens, 1) for n in parts))


def measure(tokens: ScoredCandidates, applied: Applied, exact_T: torch.Tensor, comm: Comm) -> torch.Tensor:
    """Sums over the action tokens of all ranks for `from_totals`, int64 [23]. A collective."""
    own_T = tokens.action_T
    advantage_T, sensitivity_T = tokens.advantage_T[own_T].double(), tokens.sensitivity_T[own_T].double()
    change_T = -advantage_T * sensitivity_T
    weighed_T = applied.weight_T[own_T].double() * change_T
    critical_T = critical_surprisal(tokens.surprisal_T[own_T], tokens.entropy_T[own_T], sensitivity_T)
    unlikely_T = sensitivity_T < UNLIKELY
    counts, fixed = [own_T.sum()], [change_T, critical_T]
    for sign in (1, -1):
        for side_T in (~unlikely_T, unlikely_T):
            inside_T = side_T & (advantage_T * sign > 0)
            counts.append(inside_T.sum())
            fixed += [advantage_T[inside_T].abs(), weighed_T[inside_T]]
    chosen_T = applied.selected_T
    counts += [(chosen_T & exact_T).sum(), (chosen_T | exact_T).sum()]
    sums = [fixed_point_sum(x) for x in fixed]
    broken = torch.stack([s[1] for s in sums]).sum()
    return comm.sum(torch.stack([*counts, broken, *(s[0] for s in sums)]))


def from_totals(totals: list[int]) -> tuple[Measured, ...]:
    """What `measure` returned as parts of metrics, in natural units."""
    tokens, *quadrants, both, either, broken = totals[:8]
    change, critical, *pairs = (from_fixed_point(n) for n in totals[8:])
    found = [
        Measured("dynamics/predicted_change", sum(pairs[1::2]), tokens),
        Measured("dynamics/predicted_change_unweighted", change, tokens),
        Measured("dynamics/critical_surprisal", critical, tokens),
        Measured("dynamics/overlap", both, either),
        Measured("dynamics/non_finite", broken),
    ]
    for kind, parts in (("tokens", quadrants), ("advantage", pairs[0::2]), ("change", pairs[1::2])):
        whole = sum(abs(x) for x in parts)
        found += [Measured(f"dynamics/{kind}_{q}", x, whole) for q, x in zip(QUADRANTS, parts, strict=True)]
    return tuple(found)


def critical_surprisal(surprisal_T: torch.Tensor, entropy_T: torch.Tensor, sensitivity_T: torch.Tensor) -> torch.Tensor:
    """s* of each token's distribution, nats, float64 [T]; at most H. Inputs in nats, any float dtype."""
    entropy_T, probability_T = entropy_T.double(), (-surprisal_T.double()).exp()
    excess_T = torch.where(probability_T > 0, entropy_T - surprisal_T.double(), 0.0)  # an infinite s has p s = 0
    b_T = (probability_T * excess_T - sensitivity_T.double()).clamp(min=0.0)
    return entropy_T - lambert_w0(b_T * entropy_T.exp())


def lambert_w0(x: torch.Tensor) -> torch.Tensor:
    """The w >= 0 with w e^w = x, for x >= 0 in float64, elementwise: Halley's iteration from log(1 + x)."""
    w = torch.log1p(x)
    for _ in range(_HALLEY_STEPS):
        exponential = w.exp()
        gap = w * exponential - x
        w = w - gap / (exponential * (w + 1) - (w + 2) * gap / (2 * w + 2))
    return w
