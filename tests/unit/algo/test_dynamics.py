"""Entropy dynamics of an update: quadrants, prediction, critical surprisal, overlap with the exact set."""

import dataclasses
import math

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.dynamics import Applied, critical_surprisal, exact_set, from_totals, lambert_w0, measure
from stare_megatron.algo.stare import ScoredCandidates
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.run import step_metrics as report
from stare_megatron.trainer.logprobs import token_scores
from stare_megatron.trainer.partials import VocabShard
from stare_megatron.types import UNOBSERVED, Dynamics, Mismatch, ScoreSummary, UpdateStats

V, T = 50, 600


def _step(seed: int = 0):
    """Logits of T tokens drawn from the policy, and the tokens as an update sees them."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, V, generator=g) * torch.rand(T, 1, generator=g) * 5
    target = logits.softmax(-1).multinomial(1, generator=g)[:, 0]
    got = token_scores(logits, target, VocabShard(0, V, None), temperature=1.0)
    advantage = torch.randn(T, generator=g)
    advantage[::7] = 0.0
    action = torch.rand(T, generator=g) < 0.8
    own = (-got.logprob_T, advantage, action, torch.arange(T))
    tokens = ScoredCandidates(*own, got.entropy_T, got.sensitivity_T)
    weight = torch.where(torch.rand(T, generator=g) < 0.1, 1.5, 1.0)
    selected = torch.rand(T, generator=g) < 0.1
    return logits, target, tokens, Applied(weight, selected & action)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


def test_prediction_is_what_a_small_step_on_the_logits_does():
    logits, target, tokens, applied = _step()
    got = from_totals(measure(tokens, applied, exact_set(tokens, 0.1, OneRank()), OneRank()).tolist())
    exact, eta = logits.double(), 1e-5
    push = torch.nn.functional.one_hot(target, V) - exact.softmax(-1)
    for weight, predicted in ((applied.weight_T, sum(got.change)), (torch.ones(T), got.unweighted_change)):
        step = eta * (weight * tokens.advantage_T).double()[:, None] * push
        moved = (_entropy(exact + step) - _entropy(exact - step))[tokens.action_T].sum() / (2 * eta)
        assert predicted == pytest.approx(float(moved), abs=2e-5)  # of 480 tokens; S is fp32
        assert abs(predicted) > 1e-3


def test_quadrants_are_those_of_the_critical_surprisal():
    """s* by bisection in S(s) = e^-s (H - s) - B, with B from the whole distribution."""
    logits, _, tokens, applied = _step()
    logp = torch.log_softmax(logits.double(), -1)
    h = _entropy(logits.double())
    b = (logp.exp() ** 2 * (logp + h[:, None])).sum(-1)
    low, high = torch.full_like(h, -50.0), h.clone()
    for _ in range(200):
        middle = (low + high) / 2
        above = (-middle).exp() * (h - middle) > b
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    got_critical = critical_surprisal(tokens.surprisal_T, tokens.entropy_T, tokens.sensitivity_T)
    torch.testing.assert_close(got_critical, low, atol=2e-4, rtol=0)  # B is recovered from fp32
    got = from_totals(measure(tokens, applied, exact_set(tokens, 0.1, OneRank()), OneRank()).tolist())
    unlikely, a, own = tokens.surprisal_T > low, tokens.advantage_T, tokens.action_T
    sides = [(a > 0) & ~unlikely, (a > 0) & unlikely, (a < 0) & ~unlikely, (a < 0) & unlikely]
    assert got.tokens == tuple(int((own & side).sum()) for side in sides)
    assert min(got.tokens) > 0
    assert got.advantage == pytest.approx([float(a[own & side].abs().sum()) for side in sides], abs=1e-4)
    assert [x > 0 for x in got.change] == [False, True, True, False]
    assert got.num_tokens == int(own.sum())
    assert got.critical_surprisal == pytest.approx(float(low[own].sum()), abs=0.05)
    assert got.non_finite == 0


def test_overlap_with_the_exact_set():
    _, _, tokens, applied = _step()
    exact = exact_set(tokens, 0.1, OneRank())
    same = from_totals(measure(tokens, Applied(applied.weight_T, exact), exact, OneRank()).tolist())
    assert same.intersection == same.union == int(exact.sum()) > 0
    other = from_totals(measure(tokens, applied, exact, OneRank()).tolist())
    chosen = set(applied.selected_T.nonzero()[:, 0].tolist())
    want = set(exact.nonzero()[:, 0].tolist())
    assert (other.intersection, other.union) == (len(chosen & want), len(chosen | want))


def test_any_order_and_any_split_gives_the_same_bits():
    _, _, tokens, applied = _step()
    exact = exact_set(tokens, 0.1, OneRank())
    whole = measure(tokens, applied, exact, OneRank())
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    parts = []
    for rows in order.split([1, 0, 250, T - 251]):
        part = ScoredCandidates(**{f.name: getattr(tokens, f.name)[rows] for f in dataclasses.fields(tokens)})
        used = Applied(applied.weight_T[rows], applied.selected_T[rows])
        parts.append(measure(part, used, exact[rows], OneRank()))
    assert torch.equal(torch.stack(parts).sum(0), whole)


def test_infinite_surprisal_is_no_nan():
    one = torch.ones(1)
    tokens = ScoredCandidates(one * torch.inf, one, one.bool(), torch.zeros(1, dtype=torch.int64), one, one * -0.2)
    got = from_totals(measure(tokens, Applied(one, one.bool()), one.bool(), OneRank()).tolist())
    assert got.tokens == (0, 1, 0, 0)
    assert got.change[1] == pytest.approx(0.2)
    assert got.non_finite == 0


def test_lambert_w():
    w = torch.tensor([0.0, 1e-12, 0.1, 1.0, 5.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(lambert_w0(w * w.exp()), w, rtol=1e-12, atol=1e-15)


def _update(scale: int) -> UpdateStats:
    seen = Dynamics(
        num_tokens=10 * scale,
        tokens=(4 * scale, 2 * scale, 1 * scale, 1 * scale),
        advantage=(2.0 * scale, 1.0 * scale, 0.5 * scale, 0.5 * scale),
        change=(-2.0 * scale, 1.0 * scale, 0.5 * scale, -0.5 * scale),
        unweighted_change=-3.0 * scale,
        critical_surprisal=5.0 * scale,
        intersection=1 * scale,
        union=4 * scale,
        non_finite=0,
    )
    return UpdateStats(0.0, 1.0, 1e-3, 0.0, 1.0, 0.0, 1, 1, 6, 2, 1.0, 0.0, seen)


def test_metrics_of_a_step_and_of_the_step_before():
    """Over two optimizer steps, of 10 and 30 tokens; the measured change is this entropy less the one before."""
    first = ScoreSummary(40, 0.50, 0.5, 0.5, Mismatch(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0))
    second = dataclasses.replace(first, entropy=0.42)
    updates = [_update(1), _update(3)]
    start = report.dynamics_metrics(first, updates, UNOBSERVED)
    assert math.isnan(start["dynamics/measured_change"])
    assert math.isnan(start["dynamics/predicted_change_before"])
    got = report.dynamics_metrics(second, updates, report.observed(first, updates))
    assert got["dynamics/measured_change"] == pytest.approx(-0.08)
    assert got["dynamics/predicted_change_before"] == start["dynamics/predicted_change"] == pytest.approx(-0.1)
    assert got["dynamics/predicted_change_unweighted"] == pytest.approx(-0.3)
    assert got["dynamics/critical_surprisal"] == pytest.approx(0.5)
    assert got["dynamics/overlap"] == pytest.approx(0.25)
    assert [got[f"dynamics/tokens_{q}"] for q in report.QUADRANTS] == [0.5, 0.25, 0.125, 0.125]
    assert [got[f"dynamics/advantage_{q}"] for q in report.QUADRANTS] == [0.5, 0.25, 0.125, 0.125]
    assert [got[f"dynamics/change_{q}"] for q in report.QUADRANTS] == [-0.5, 0.25, 0.125, -0.125]
    metrics(got)  # every name is in the catalogue
