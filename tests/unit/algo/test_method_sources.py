"""What the papers and their authors' code say of each method: defaults, and small cases worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.losses.types import LossInputs, Sequences, TokenLoss
from stare_megatron.algo.reduce import token_factors
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import ScoredCandidates
from stare_megatron.config import AlgorithmConfig, load
from stare_megatron.config.methods import METHODS, NO_DUAL_CLIP
from stare_megatron.types import Control

ROOT = Path(__file__).parents[3]
SHUT = Control(False, 1.0, 1.0, 0.5, 0.3)


def config(method: str, **settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"method": method, **settings})


def column(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def token_loss(settings: AlgorithmConfig, logprob_T, old_T, advantage_T, entropy_T=None) -> TokenLoss:
    """The unreduced loss of one sequence; the choice of tokens is made under the scoring policy, `old_T`."""
    entropy_T = torch.zeros_like(old_T) if entropy_T is None else entropy_T
    algorithm, count = ALGORITHMS[settings.method], len(old_T)
    tokens = ScoredCandidates(
        surprisal_T=-old_T,
        advantage_T=advantage_T,
        action_T=torch.ones(count, dtype=torch.bool),
        global_id_T=torch.arange(count),
        entropy_T=entropy_T.detach(),
        sensitivity_T=torch.zeros_like(old_T),
    )
    weights = algorithm.weigh(tokens, SHUT, settings, OneRank())
    inputs = LossInputs(
        logprob_T=logprob_T,
        old_logprob_T=old_T,
        entropy_T=entropy_T,
        advantage_T=advantage_T,
        weight_T=weights.weight_T,
        selected_T=weights.selection.selected_T,
        correction_T=torch.ones_like(old_T),
        sequences=Sequences(torch.zeros(count, dtype=torch.int64), 1, OneRank()),
        control=SHUT,
    )
    return algorithm.loss(inputs, settings)


def ratios(settings: AlgorithmConfig, ratio, advantage) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in log-prob of tokens with these ratios; all at old log-prob -1."""
    old_T = torch.full((len(ratio),), -1.0, dtype=torch.float64)
    logprob_T = (old_T + column(ratio).log()).requires_grad_()
    loss_T = token_loss(settings, logprob_T, old_T, column(advantage)).loss_T
    loss_T.sum().backward()
    assert logprob_T.grad is not None
    return loss_T.detach(), logprob_T.grad


DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0, "reduction": "token-mean"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "reduction": "token-mean", "dapo.overlong_share": 4096 / 20480},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": NO_DUAL_CLIP, "normalize_std": False},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence-mean-token-mean"},
    "gmpo": {"clip_low": 0.4, "clip_high": 0.4, "reduction": "sequence-mean-token-mean"},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0, "reduction": "token-mean"},
    "clip_cov": {"clip_low": 1.0, "clip_high": 1.0, "clip_cov.fraction": 2e-4, "clip_cov.low": 1, "clip_cov.high": 5},
    "kl_cov": {"kl_cov.fraction": 2e-3, "kl_cov.coefficient": 1.0},
    "entropy_bonus": {"entropy_bonus.coefficient": 1e-3},
    "adaptive_entropy": {
        "clip_high": 0.2,
        "adaptive_entropy.target_entropy": 0.2,
        "adaptive_entropy.step": 1e-4,
        "adaptive_entropy.maximum": 5e-3,
    },
    "entropy_advantage": {"clip_high": 0.28, "entropy_advantage.alpha": 0.4, "entropy_advantage.kappa": 2.0},
    "high_entropy_tokens": {"clip_high": 0.28, "high_entropy_tokens.fraction": 0.2, "reduction": "token-mean"},
    "w_reinforce": {"clip_high": 0.2, "w_reinforce.positive_weight": 0.1, "w_reinforce.entropy_coefficient": 1e-4},
    "stare": {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "dual_clip": 10.0,
        "stare.variant": "O1",
        "stare.fraction": 0.1,
        "stare.weight_pos": 1.1,
        "stare.weight_neg": 0.9,
        "stare.target_entropy": 0.3,
        "stare.adaptive": False,
        "stare.alpha": 0.01,
        "stare.weight_pos_max": 1.5,
        "stare.weight_neg_min": 0.5,
    },
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_are_the_papers(method):
    fixed = {"reduction": config(method).reduction, "normalize_std": config(method).normalize_std}
    settings: dict[str, Any] = {**config(method).model_dump(), **fixed}
    for key, want in DEFAULTS[method].items():
        section, _, name = key.rpartition(".")
        assert (settings[section] if section else settings)[name] == want, key


def test_dapo_penalises_rewards_of_0_and_1_as_the_paper_does_those_of_minus_1_and_1():
    # L = 20480, L_cache = 4096 (section 4.1). Lengths: below the buffer, at its middle, at the end, below it.
    paper = [1.0, 1.0 - 0.5, -1.0 - 1.0, -1.0]
    mean = sum(paper) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in paper) / 3)
    outcomes = [Outcome(1.0, 9000), Outcome(1.0, 18432), Outcome(0.0, 20480), Outcome(0.0, 16384)]
    got = ALGORITHMS["dapo"].advantage(outcomes, config("dapo", response_tokens=20480))
    assert got == pytest.approx([(r - mean) / std for r in paper], rel=1e-5)


def test_high_entropy_tokens_average_over_the_chosen():
    # Equation 6: the indicator stands in the denominator too. ceil(0.2 x 6) = 2 tokens, those of entropy 2 and 3.
    entropy_T = column([0.1, 2.0, 0.3, 0.2, 3.0, 0.0])
    old_T = torch.full((6,), -1.0, dtype=torch.float64)
    settings = config("high_entropy_tokens")
    loss_T = token_loss(settings, old_T + column([0.1] * 6), old_T, column([2.0] * 6), entropy_T).loss_T
    factor_T = token_factors(settings.reduction, column([6.0] * 6), num_action_tokens=6, num_sequences=1)
    assert float((factor_T * loss_T).sum()) == pytest.approx(-2.0 * math.exp(0.1))
    assert loss_T.nonzero()[:, 0].tolist() == [1, 4]


@pytest.mark.parametrize("method", ["dr_grpo", "w_reinforce", "adaptive_entropy"])
def test_no_bound_on_the_ratio_of_negative_advantages(method):
    loss_T, grad_T = ratios(config(method), [50.0], [-1.0])
    assert (float(loss_T), float(grad_T)) == pytest.approx((50.0, 50.0))


@pytest.mark.parametrize("method", ["grpo", "dapo", "stare", "entropy_bonus", "entropy_advantage"])
def test_dual_clip_at_ten(method):
    loss_T, grad_T = ratios(config(method), [9.0, 50.0], [-1.0, -1.0])
    assert loss_T.tolist() == pytest.approx([9.0, 10.0])
    assert grad_T.tolist() == pytest.approx([9.0, 0.0])


def test_cispo_has_no_lower_bound_and_cuts_the_weight_at_five():
    # Gradient -min(r, 5) A, whatever the sign of A.
    _, grad_T = ratios(config("cispo"), [0.01, 1.0, 4.0, 6.0, 6.0], [1.0, 1.0, -2.0, 1.0, -1.0])
    assert grad_T.tolist() == pytest.approx([-0.01, -1.0, 8.0, -5.0, 5.0])


def test_clip_cov_clips_at_twice_the_probability():
    settings = config("clip_cov", clip_cov={"low": 1e3, "high": 2e3})  # no token is in the band
    loss_T, grad_T = ratios(settings, [0.01, 1.9, 2.5, 2.5], [-1.0, 1.0, 1.0, -1.0])
    assert loss_T.tolist() == pytest.approx([0.01, -1.9, -2.0, 2.5])
    assert grad_T.tolist() == pytest.approx([0.01, -1.9, 0.0, 2.5])


def test_kl_cov_penalises_the_two_largest_of_a_thousand():
    old_T = -torch.linspace(0.001, 2.0, 1000, dtype=torch.float64)
    advantage_T = torch.where(torch.arange(1000) == 5, 9.0, torch.where(torch.arange(1000) == 40, 8.0, 0.0)).double()
    moved_T = old_T + 0.25
    loss_T = token_loss(config("kl_cov"), moved_T, old_T, advantage_T).loss_T
    penalty_T = loss_T + advantage_T * math.exp(0.25)
    assert penalty_T.nonzero()[:, 0].tolist() == [5, 40]
    assert penalty_T[[5, 40]].tolist() == pytest.approx([0.25, 0.25])


def test_w_reinforce_has_a_small_entropy_bonus():
    old_T = column([-1.0, -1.0])
    entropy_T = column([0.5, 2.0]).requires_grad_()
    loss_T = token_loss(config("w_reinforce"), old_T, old_T, column([0.1, -1.0]), entropy_T).loss_T
    assert loss_T.tolist() == pytest.approx([-0.1 - 0.5e-4, 1.0 - 2e-4])
    loss_T.sum().backward()
    assert ALGORITHMS["w_reinforce"].entropy_gradient
    assert entropy_T.grad is not None
    assert entropy_T.grad.tolist() == pytest.approx([-1e-4, -1e-4])
    off = config("w_reinforce", w_reinforce={"entropy_coefficient": 0.0})
    assert token_loss(off, old_T, old_T, column([0.1, -1.0]), column([0.5, 2.0])).loss_T.tolist() == [-0.1, 1.0]


RUN = """
[run]
steps = 1
[model]
path = "m"
[data]
train = ["d"]
[reward]
name = "math"
"""


def index_rows() -> list[tuple[str, list[str], str]]:
    """Name, settings and page of every row of the index."""
    page = (ROOT / "docs" / "algorithms" / "README.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return [(name, re.findall(r"`([^`]*)`", settings), link) for name, settings, link in rows[2:]]


def test_index_names_every_method():
    rows = index_rows()
    assert {f"algorithm.method={method}" for method in METHODS} == {settings[0] for _, settings, _ in rows}
    names = {name for name, _, _ in rows}
    asked = (
        "GRPO, GRPO-ds, DAPO, Dr. GRPO, GSPO, GMPO, CISPO, Clip-Cov, KL-Cov, Entropy bonus, "
        "Adaptive entropy coefficient, Entropy-based advantage, High-entropy tokens (80/20), W-REINFORCE, STARE-O1, "
        "STARE-C2, STARE adaptive, STARE proportional, STARE proportional-integral"
    )
    assert set(asked.split(", ")) - names == set()


@pytest.mark.parametrize(("name", "settings", "link"), index_rows())
def test_index_settings_are_accepted_and_lead_to_the_page(tmp_path, name, settings, link):
    file = tmp_path / "run.toml"
    file.write_text(RUN)
    run = load(file, settings)
    page = ROOT / "docs" / "algorithms" / f"{run.algorithm.method}.md"
    assert link.endswith(f"]({page.name})")
    assert name in page.read_text()
