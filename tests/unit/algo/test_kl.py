"""The KL to a reference policy: values and gradients of its estimators, and whose gradient each of them is."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.kl import estimate, penalized, with_kl
from stare_megatron.algo.losses.types import TokenLoss
from stare_megatron.config.kl import Estimator, KlConfig

ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
D = np.array([-19.5, -3.0, -0.4, -1e-4, 0.0, 1e-4, 0.7, 2.0, 40.0])
VALUES = {"k1": D, "k2": D * D / 2, "k3": np.expm1(-D) + D}
SLOPES = {"k1": np.ones_like(D), "k2": D, "k3": -np.expm1(-D)}


def policy(*, seed: int = 0, choices: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy of one token, float64, and log-probs of a reference."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(choices, dtype=torch.float64, generator=generator).requires_grad_()
    return logits, torch.randn(choices, dtype=torch.float64, generator=generator).log_softmax(0)


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(value, logits)
    return found


@pytest.mark.parametrize("name", ESTIMATORS)
def test_value_and_gradient_of_each_estimator(name):
    reference_T = torch.linspace(-3, -1, len(D), dtype=torch.float64)
    logprob_T = (reference_T + torch.from_numpy(D)).requires_grad_()
    found_T = estimate(logprob_T, reference_T, name)
    np.testing.assert_allclose(found_T.detach().numpy(), VALUES[name], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(gradient(found_T.sum(), logprob_T).numpy(), SLOPES[name], rtol=1e-9, atol=1e-15)


def test_k3_of_a_token_that_the_policy_does_not_sample_is_finite():
    logprob_T = torch.tensor([-1000.0]).requires_grad_()
    found_T = estimate(logprob_T, torch.tensor([0.0]), "k3")
    assert found_T.item() == pytest.approx(math.expm1(20) - 20)
    assert gradient(found_T.sum(), logprob_T).item() == 0


@pytest.mark.parametrize(("name", "biased"), [("k1", False), ("k2", True), ("k3", False)])
def test_whose_value_it_is_over_the_policys_samples(name, biased):
    logits, reference_V = policy()
    logprob_V = logits.detach().log_softmax(0)
    kl = (logprob_V.exp() * (logprob_V - reference_V)).sum().item()
    mean = (logprob_V.exp() * estimate(logprob_V, reference_V, name)).sum().item()
    assert (abs(mean - kl) > 1e-2) is biased
    assert biased or mean == pytest.approx(kl, rel=1e-12)


def test_whose_gradient_it_is_over_the_policys_samples():
    """k2 in the loss and k1 in the reward: the reverse KL's. k3 in the loss: the forward KL's."""
    logits, reference_V = policy()
    logprob_V = logits.log_softmax(0)
    chance_V = logprob_V.detach().exp()  # of being sampled
    reverse = gradient((logprob_V.exp() * (logprob_V - reference_V)).sum(), logits)
    logprob_V = logits.log_softmax(0)
    forward = gradient((reference_V.exp() * (reference_V - logprob_V)).sum(), logits)
    assert not torch.allclose(reverse, forward, atol=1e-2)

    def in_loss(name: Estimator) -> torch.Tensor:
        return gradient((chance_V * estimate(logits.log_softmax(0), reference_V, name)).sum(), logits)

    def in_reward(name: Estimator) -> torch.Tensor:
        logprob_V = logits.log_softmax(0)
        return gradient((chance_V * estimate(logprob_V.detach(), reference_V, name) * logprob_V).sum(), logits)

    torch.testing.assert_close(in_loss("k2"), reverse)
    torch.testing.assert_close(in_reward("k1"), reverse)
    torch.testing.assert_close(in_loss("k3"), forward)
    torch.testing.assert_close(in_loss("k1"), torch.zeros_like(reverse), atol=1e-14, rtol=0)
    for name in ("k2", "k3"):
        assert not torch.allclose(in_reward(name), reverse, atol=1e-2)


def test_in_the_reward_a_sampled_sequences_sum_has_the_gradient_of_the_sequences_kl():
    """Two tokens, the second's distribution by the first: every sequence, the sum of k1 over it as its penalty."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_()  # first token, then by it
    reference = torch.randn(5, 4, dtype=torch.float64, generator=generator).log_softmax(1)
    logprob = table.log_softmax(1)
    whole = logprob[0][:, None] + logprob[1:]
    d = whole - (reference[0][:, None] + reference[1:])
    true = gradient((whole.exp() * d).sum(), table)
    logprob = table.log_softmax(1)
    whole = logprob[0][:, None] + logprob[1:]
    outcomes = [Outcome(0.0, 2)] * 16
    sums = d.detach().flatten().tolist()
    rewards = torch.tensor([o.reward for o in penalized(outcomes, sums, 1.0)], dtype=torch.float64).view(4, 4)
    found = gradient(-(whole.detach().exp() * rewards * whole).sum(), table)
    torch.testing.assert_close(found, true)


def test_in_the_loss_the_term_is_added_and_reported():
    logprob_T, old_T, reference_T = (torch.tensor(x) for x in ([-1.0, -2.0], [-1.5, -2.0], [-1.2, -1.0]))
    plain = TokenLoss(torch.tensor([0.5, -0.5]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    found = with_kl(plain, logprob_T, old_T, reference_T, KlConfig(coefficient=0.1, estimator="k2"))
    torch.testing.assert_close(found.loss_T, torch.tensor([0.5 + 0.1 * 0.02, -0.5 + 0.1 * 0.5]))
    torch.testing.assert_close(found.metrics["kl/penalty"].x, torch.tensor([0.002, 0.05]))
    torch.testing.assert_close(found.metrics["kl/reference"].x, estimate(logprob_T, reference_T, "k3"))


def test_in_the_reward_the_loss_is_as_it_was_and_the_penalty_is_the_sampling_policys():
    logprob_T, old_T, reference_T = (torch.tensor(x) for x in ([-1.0, -2.0], [-1.5, -2.0], [-1.2, -1.0]))
    plain = TokenLoss(torch.tensor([0.5, -0.5]), torch.ones(2), torch.zeros(2, dtype=torch.bool))
    kl = KlConfig(coefficient=0.1, place="reward", estimator="k1")
    found = with_kl(plain, logprob_T, old_T, reference_T, kl)
    assert found.loss_T is plain.loss_T
    torch.testing.assert_close(found.metrics["kl/penalty"].x, torch.tensor([-0.03, -0.1]))
    assert penalized([Outcome(1.0, 2)], [-1.3], 0.1) == [Outcome(1.13, 2)]
