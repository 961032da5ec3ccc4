"""KL to a reference policy, estimated at the sampled tokens, d = log policy - log reference at the rollout temperature.

k1 = d         k2 = d^2 / 2         k3 = exp(-d) - 1 + d          (J. Schulman, Approximating KL Divergence, 2020)

As values, over samples of the policy: k1 and k3 have mean KL(policy || reference), the reverse KL; k3 is never negative
and varies less; k2 is biased by terms of third order in d.

As gradients it is another order (arXiv 2510.01555; arXiv 2512.21852):

reward, k1   E[k1 grad log policy] is the gradient of the reverse KL: the score function's other term has mean 0.
reward, k2   E[d^2 / 2 grad log policy]: not a KL's. k3 in the reward is not one either: its score-function gradient
             leaves out that of k3 itself.
loss, k2     grad k2 = d grad log policy: the reverse KL's gradient, at every token that of k1 in the reward.
loss, k3     grad k3 = (1 - exp(-d)) grad log policy, of mean -E_reference[grad log policy]: the gradient of
             KL(reference || policy), the forward KL; to first order in d the same. GRPO's (arXiv 2402.03300, eq. 4).
loss, k1     grad log policy, of mean 0: refused by the configuration.

The means are over samples of the policy being updated. After the first of several updates, or of an older policy's
tokens, they are those of whoever sampled; no importance weight is put on the term, as in GRPO.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.losses.types import Reported, TokenLoss
from stare_megatron.algo.surrogate import MAX_LOG_RATIO
from stare_megatron.config.kl import Estimator, KlConfig


def estimate(logprob_T: torch.Tensor, reference_T: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """The estimator at each token, [T], nats; differentiable in `logprob_T`.

    k3 goes no further than a token e^20 times as likely under the reference, which the policy does not sample.
    """
    d_T = logprob_T - reference_T
    if estimator == "k1":
        return d_T
    if estimator == "k2":
        return d_T.square() / 2
    over_T = (-d_T).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(over_T) - over_T


def with_kl(
    plain: TokenLoss, logprob_T: torch.Tensor, old_logprob_T: torch.Tensor, reference_T: torch.Tensor, kl: KlConfig
) -> TokenLoss:
    """`plain` with the term on each token's loss where that is its place, and what is reported of it in either.

    `logprob_T`: of the policy being updated; `old_logprob_T`: of that which the reward's penalty was taken from.
    """
    current_T = logprob_T.detach()
    reported = {"kl/reference": Reported(estimate(current_T, reference_T, "k3"))}
    if kl.place == "reward":
        penalty_T = kl.coefficient * estimate(old_logprob_T, reference_T, kl.estimator)
        return dataclasses.replace(plain, metrics={**plain.metrics, **reported, "kl/penalty": Reported(penalty_T)})
    penalty_T = kl.coefficient * estimate(logprob_T, reference_T, kl.estimator)
    reported["kl/penalty"] = Reported(penalty_T.detach())
    return dataclasses.replace(plain, loss_T=plain.loss_T + penalty_T, metrics={**plain.metrics, **reported})


def penalized(outcomes: Sequence[Outcome], sums: Sequence[float], coefficient: float) -> list[Outcome]:
    """Outcomes whose rewards are less `coefficient` times the sum of the estimator over each one's action tokens."""
    return [
        dataclasses.replace(outcome, reward=outcome.reward - coefficient * total)
        for outcome, total in zip(outcomes, sums, strict=True)
    ]
