"""Entropy dynamics of an update: quadrants, prediction, critical surprisal, overlap with the exact set."""

import dataclasses
import math

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.dynamics import Applied, critical_surprisal, exact_set, from_totals, lambert_w0, measure
from stare_megatron.algo.stare import ScoredCandidates
from stare_megatron.metrics.catalogue import by_name
from stare_megatron.metrics.reduce import reduce
from stare_megatron.trainer.logprobs import token_scores
from stare_megatron.trainer.partials import VocabShard
from stare_megatron.types import QUADRANTS, Measurements

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


def _measured(tokens: ScoredCandidates, applied: Applied, exact_T: torch.Tensor) -> Measurements:
    return Measurements(from_totals(measure(tokens, applied, exact_T, OneRank()).tolist()))


def _sums(got: Measurements, kind: str) -> list[float]:
    return [got.part(f"dynamics/{kind}_{q}").total for q in QUADRANTS]


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    logp = torch.log_softmax(logits, -1)
    return -(logp.exp() * logp).sum(-1)


def test_prediction_is_what_a_small_step_on_the_logits_does():
    logits, target, tokens, applied = _step()
    got = _measured(tokens, applied, exact_set(tokens, 0.1, OneRank()))
    exact, eta = logits.double(), 1e-5
    push = torch.nn.functional.one_hot(target, V) - exact.softmax(-1)
    for weight, predicted in (
        (applied.weight_T, got.part("dynamics/predicted_change").total),
        (torch.ones(T), got.part("dynamics/predicted_change_unweighted").total),
    ):
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
    got = _measured(tokens, applied, exact_set(tokens, 0.1, OneRank()))
    unlikely, a, own = tokens.surprisal_T > low, tokens.advantage_T, tokens.action_T
    sides = [(a > 0) & ~unlikely, (a > 0) & unlikely, (a < 0) & ~unlikely, (a < 0) & unlikely]
    assert _sums(got, "tokens") == [int((own & side).sum()) for side in sides]
    assert min(_sums(got, "tokens")) > 0
    assert _sums(got, "advantage") == pytest.approx([float(a[own & side].abs().sum()) for side in sides], abs=1e-4)
    assert [x > 0 for x in _sums(got, "change")] == [False, True, True, False]
    critical = got.part("dynamics/critical_surprisal")
    assert critical.weight == int(own.sum())
    assert critical.total == pytest.approx(float(low[own].sum()), abs=0.05)
    assert got["dynamics/non_finite"] == 0


def test_overlap_with_the_exact_set():
    _, _, tokens, applied = _step()
    exact = exact_set(tokens, 0.1, OneRank())
    same = _measured(tokens, Applied(applied.weight_T, exact), exact).part("dynamics/overlap")
    assert same.total == same.weight == int(exact.sum()) > 0
    other = _measured(tokens, applied, exact).part("dynamics/overlap")
    chosen = set(applied.selected_T.nonzero()[:, 0].tolist())
    want = set(exact.nonzero()[:, 0].tolist())
    assert (other.total, other.weight) == (len(chosen & want), len(chosen | want))


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
    got = _measured(tokens, Applied(one, one.bool()), one.bool())
    assert _sums(got, "tokens") == [0, 1, 0, 0]
    assert _sums(got, "change")[1] == pytest.approx(0.2)
    assert got["dynamics/non_finite"] == 0


def test_lambert_w():
    w = torch.tensor([0.0, 1e-12, 0.1, 1.0, 5.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(lambert_w0(w * w.exp()), w, rtol=1e-12, atol=1e-15)


def test_metrics_of_two_optimizer_steps():
    """Of 10 and 30 tokens: means are over the tokens of both, fractions of both steps' sums."""

    def update(scale: int):
        fixed = [-3.0, 5.0, 2.0, -2.0, 1.0, 1.0, 0.5, 0.5, 0.5, -0.5]
        return from_totals([scale * n for n in (10, 4, 2, 1, 1, 1, 4, 0, *(int(x * 2**24) for x in fixed))])

    got = by_name(reduce([*update(1), *update(3)]))
    assert got["dynamics/predicted_change"] == pytest.approx(-0.1)
    assert got["dynamics/predicted_change_unweighted"] == pytest.approx(-0.3)
    assert got["dynamics/critical_surprisal"] == pytest.approx(0.5)
    assert got["dynamics/overlap"] == pytest.approx(0.25)
    assert [got[f"dynamics/tokens_{q}"] for q in QUADRANTS] == [0.5, 0.25, 0.125, 0.125]
    assert [got[f"dynamics/advantage_{q}"] for q in QUADRANTS] == [0.5, 0.25, 0.125, 0.125]
    assert [got[f"dynamics/change_{q}"] for q in QUADRANTS] == [-0.5, 0.25, 0.125, -0.125]


def test_without_advantage_no_fraction_is_anything():
    got = by_name(reduce(from_totals([10, *([0] * 17)])))
    assert [got[f"dynamics/change_{q}"] for q in QUADRANTS] == [0.0] * 4
    assert math.isnan(got["dynamics/overlap"])
