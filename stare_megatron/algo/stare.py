"""STARE's token weights (arXiv 2606.19236): which action tokens are entropy-critical, and by how much they count.

Action tokens are split by the sign of their advantage, T+ = {A > 0} and T- = {A < 0}. The k = ceil(P n) most critical
tokens of each are the entropy-critical sets L+ and L-. With the gate closed w = 1; with it open, O1: w = W on L+; C2:
w = W on L+ and M on L-.

A selector says which tokens are most critical; for both subsets it is the same order:

    surprisal     largest s = -log pi (the paper)
    relative      largest s - H: surprisal beyond what the distribution makes one expect
    sensitivity   smallest S: a step changes the entropy by dH = -eta A S, so in T+ these raise it most (W amplifies
                  them), in T- they lower it most (M damps them)

High surprisal stands for low S in all of them: S < 0 exactly where s exceeds the token's critical surprisal
(`algo.dynamics`). Weights that set themselves need no selector and no P: L+ and L- are all tokens with S < 0
(`raising`), and the weight follows from what these do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stare_megatron.algo.comm import Comm
from stare_megatron.algo.selection import NEGATIVE, NEITHER, POSITIVE, Selection, select_top, subset_codes
from stare_megatron.config import Selector, StareConfig
from stare_megatron.types import Control

UNLIKELY = -2e-6  # nats; S of fp32 logits is known to this much. At or above it a token counts as likely


@dataclass(frozen=True, eq=False)
class Candidates:
    """Tokens to be weighed, [T] each: this rank's part of the scope (update batch or micro-batch).

    `surprisal_T` float32, nats, under the policy about to be updated, as the trainer scored it or, with
    `trainer.scoring = "rollout"`, as the engine did; `advantage_T`; `action_T` bool: a token of this rank that carries
    loss; `global_id_T` int64.
    """

    surprisal_T: torch.Tensor
    advantage_T: torch.Tensor
    action_T: torch.Tensor
    global_id_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class ScoredCandidates(Candidates):
    """With what only the trainer knows, [T] float32, nats: `entropy_T` and `sensitivity_T` (S)."""

    entropy_T: torch.Tensor
    sensitivity_T: torch.Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """`weight_T` float [T]: factor of each token's loss.

    `subset_T` int64 [T]: POSITIVE, NEGATIVE or NEITHER; `selection`: L+ and L-.
    """

    weight_T: torch.Tensor
    subset_T: torch.Tensor
    selection: Selection


def require_scores(tokens: Candidates, reader: str) -> ScoredCandidates:
    """`tokens`, for a `reader` that takes entropy or sensitivity of them.

    Raises:
        TypeError: nobody scored them; `methods.METHODS` should have said that the reader needs it.
    """
    if not isinstance(tokens, ScoredCandidates):
        raise TypeError(f"{reader} reads the entropy or sensitivity of each token, and there was no scoring pass")
    return tokens


def criticality(tokens: Candidates, selector: Selector) -> torch.Tensor:
    """What the quantile is taken of, float [T]; the largest are chosen, in T+ and in T- alike."""
    if selector == "surprisal":
        return tokens.surprisal_T
    scored = require_scores(tokens, f"the selector {selector!r}")
    if selector == "relative":
        return scored.surprisal_T - scored.entropy_T
    return -scored.sensitivity_T


def raising(tokens: ScoredCandidates) -> torch.Tensor:
    """bool [T]: the action tokens with S < 0 and an advantage. In T+ a weight above 1 on them raises the entropy, in T-
    one below 1 spares it; on all others of T+ and T- it does the opposite. Each token answers for itself, so no layout
    changes the choice."""
    return tokens.action_T & (tokens.advantage_T != 0) & (tokens.sensitivity_T < UNLIKELY)


def _choose(tokens: Candidates, config: StareConfig, comm: Comm) -> tuple[torch.Tensor, Selection]:
    """Subset codes and the chosen tokens, L+ and L-. A collective."""
    subset_T = subset_codes(tokens.advantage_T, tokens.action_T)
    if config.weight == "fixed":
        key_T = criticality(tokens, config.selector)
        return subset_T, select_top(key_T, subset_T, tokens.global_id_T, config.fraction, comm)
    scored = require_scores(tokens, 'weight = "auto"')
    taken_T, nan_T = raising(scored), scored.sensitivity_T.isnan()
    subsets = [subset_T == code for code in (POSITIVE, NEGATIVE)]
    masks = [x_T & ~nan_T for x_T in subsets] + [x_T & taken_T for x_T in subsets] + [nan_T & (subset_T != NEITHER)]
    count = comm.sum(torch.stack([mask_T.sum() for mask_T in masks]))
    return subset_T, Selection(taken_T, count_S=count[:2], selected_S=count[2:4], nan=count[4])


def weigh(tokens: Candidates, control: Control, config: StareConfig, comm: Comm) -> Weights:
    """Token weights of variant O1 or C2. L+ and L- are found, and can be reported, with the gate closed too."""
    subset_T, chosen = _choose(tokens, config, comm)
    weight_T = torch.ones_like(tokens.advantage_T)
    if control.gate_on:
        weight_T = torch.where(chosen.selected_T & (subset_T == POSITIVE), control.weight_pos, weight_T)
        if config.variant == "C2":
            weight_T = torch.where(chosen.selected_T & (subset_T == NEGATIVE), control.weight_neg, weight_T)
    return Weights(weight_T, subset_T, chosen)


def weigh_equally(tokens: Candidates, comm: Comm) -> Weights:
    """Weight 1 everywhere and empty L+ and L-, for methods without selection."""
    subset_T = subset_codes(tokens.advantage_T, tokens.action_T)
    count_S = comm.sum(torch.stack([(subset_T == code).sum() for code in (POSITIVE, NEGATIVE)]))
    nothing = Selection(torch.zeros_like(tokens.action_T), count_S, torch.zeros_like(count_S), count_S.new_zeros(()))
    return Weights(torch.ones_like(tokens.advantage_T), subset_T, nothing)
