"""Log-prob and entropy of vocab-parallel logits against float64, with what has gone wrong elsewhere."""

import math

import pytest
import torch

from stare_megatron.trainer import logprobs_torch, partials
from stare_megatron.trainer.logprobs import log_probs, token_scores
from stare_megatron.trainer.partials import NO_TARGET, VocabShard

V = 1000


def _logits(rows: int = 12, columns: int = V, seed: int = 0) -> torch.Tensor:
    """Peaked and flat rows, as a language model makes them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * torch.linspace(0.2, 6.0, rows)[:, None]


def _targets(rows: int = 12, columns: int = V, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(seed))


def _reference(logits: torch.Tensor, target: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(logits.double() / tau, -1)
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp, 0.0).sum(-1)
    return logp.gather(1, target.clamp(0)[:, None])[:, 0], entropy


def _reference_sensitivity(logits: torch.Tensor, target: torch.Tensor, tau: float) -> torch.Tensor:
    """S = p_y (H - s_y) - B, B = sum p^2 (log p + H), by the definition, in float64."""
    logp = torch.log_softmax(logits.double() / tau, -1).clamp(min=-1e3)
    p = logp.exp()
    entropy = -(p * logp).sum(-1, keepdim=True)
    slope = p * (logp + entropy)
    return slope.gather(1, target[:, None])[:, 0] - (p * slope).sum(-1)


WHOLE = VocabShard(0, V, None)


def _sharded(logits: torch.Tensor, target: torch.Tensor, tau: float, size: int, padding: int):
    """What `size` tensor-parallel ranks compute, the last ones holding hostile padding."""
    hostile = torch.full((logits.shape[0], padding), 1e4)
    parts = torch.cat([logits, hostile], 1).chunk(size, 1)
    width = parts[0].shape[1]
    shards = [VocabShard(i * width, min(max(V - i * width, 0), width), None) for i in range(size)]
    known = [
        logprobs_torch.partials(p, target, s, tau, sensitivity=True, raw=False)
        for p, s in zip(parts, shards, strict=True)
    ]
    whole = partials.combine(torch.stack(known), tau)
    row = partials.merged(whole)
    return row, partials.sensitivity(whole, row, tau)


@pytest.mark.parametrize("tau", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0, 1e4])
@pytest.mark.parametrize("columns", [V, 151_936])
def test_float64_reference(offset, tau, columns):
    logits, target = _logits(columns=columns) + offset, _targets(columns=columns)
    got = token_scores(logits, target, VocabShard(0, columns, None), temperature=tau)
    for value, want in zip((got.logprob_T, got.entropy_T), _reference(logits, target, tau), strict=True):
        torch.testing.assert_close(value.double(), want, atol=2e-6, rtol=0)
    exact = _reference_sensitivity(logits, target, tau)
    torch.testing.assert_close(got.sensitivity_T.double(), exact, atol=2e-6, rtol=0)
    torch.testing.assert_close(got.raw_logprob_T.double(), _reference(logits, target, 1.0)[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("size", "padding"), [(2, 0), (2, 24), (4, 24), (4, 600), (8, 2200)])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_vocabulary_shards_and_hostile_padding(size, padding, tau):
    """With (4, 600) the last rank is half padding; with (8, 2200) four ranks hold nothing else."""
    logits, target = _logits(), _targets()
    merged, sensitivity = _sharded(logits, target, tau, size, padding)
    want = _reference(logits, target, tau)
    torch.testing.assert_close(merged.logprob(tau), want[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(merged.entropy(), want[1], atol=2e-6, rtol=0)
    torch.testing.assert_close(sensitivity, _reference_sensitivity(logits, target, tau), atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_masked_vocabulary_gives_no_nan(size):
    """Half of the columns -inf, and in some rows all columns of some ranks."""
    logits, target = _logits(), _targets(columns=100)
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    mask[3, V // 2 :] = True
    mask[4, : V // 4] = True
    logits[mask] = -torch.inf
    merged, sensitivity = _sharded(logits, target, 1.0, size, 0)
    want = _reference(logits, target, 1.0)
    assert torch.isinf(want[0]).any()
    torch.testing.assert_close(merged.logprob(1.0), want[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(merged.entropy(), want[1], atol=2e-6, rtol=0)
    torch.testing.assert_close(sensitivity, _reference_sensitivity(logits, target, 1.0), atol=2e-6, rtol=0)


def test_a_nan_logit_is_not_hidden():
    logits = _logits()
    logits[2, 7] = torch.nan
    for size in (1, 2):
        merged, sensitivity = _sharded(logits, _targets(), 1.0, size, 0)
        assert merged.logprob(1.0).isnan().nonzero().tolist() == [[2]]
        assert merged.entropy().isnan().nonzero().tolist() == [[2]]
        assert sensitivity.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("chunk", [1, 3 * V, 1 << 18])
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_gradient(monkeypatch, chunk, entropy_gradient, tau):
    monkeypatch.setattr(logprobs_torch, "CHUNK_ELEMENTS", chunk)
    logits = torch.cat([_logits(), torch.full((12, 8), 1e4)], 1)
    target = _targets()
    target[[1, 4, 5, 11]] = NO_TARGET
    kept = target != NO_TARGET
    weight = torch.linspace(-1, 1, 12)

    exact = logits[:, :V].double().requires_grad_()
    logprob, entropy = _reference_graph(exact, target, tau)
    (weight.double() * kept * (logprob + entropy_gradient * 0.3 * entropy)).sum().backward()

    leaf = logits.clone().requires_grad_()
    got_logprob, got_entropy = log_probs(
        leaf * 1.0, target, VocabShard(0, V, None), temperature=tau, entropy_gradient=entropy_gradient
    )
    assert got_logprob[~kept].eq(0).all()
    assert got_entropy.requires_grad is entropy_gradient
    (weight * (got_logprob + entropy_gradient * 0.3 * got_entropy)).sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad[:, :V].double(), exact.grad, atol=2e-6, rtol=0)
    assert leaf.grad[:, V:].eq(0).all()
    assert leaf.grad[~kept].eq(0).all()


def _reference_graph(logits, target, tau):
    logp = torch.log_softmax(logits / tau, -1)
    return logp.gather(1, target.clamp(0)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_gradient_under_a_mask_is_finite():
    logits = _logits()
    logits[:, 500:] = -torch.inf
    leaf = logits.clone().requires_grad_()
    logprob, entropy = log_probs(leaf * 1.0, _targets(columns=500), WHOLE, temperature=1.0, entropy_gradient=True)
    (logprob + entropy).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad[:, 500:].eq(0).all()


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_bf16_loses_only_its_own_rounding(entropy_gradient):
    """Scores within 2e-6 of float64 on the same logits; each gradient is the nearest bf16 to one within 2e-6."""
    logits = _logits().bfloat16()
    got = token_scores(logits, _targets(), WHOLE, temperature=0.6)
    want = _reference(logits.float(), _targets(), 0.6)
    torch.testing.assert_close(got.logprob_T.double(), want[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(got.entropy_T.double(), want[1], atol=2e-6, rtol=0)

    exact = logits.double().requires_grad_()
    logprob, entropy = _reference_graph(exact, _targets(), 0.6)
    (logprob + entropy_gradient * 0.3 * entropy).sum().backward()
    leaf = logits.clone().requires_grad_()
    got = log_probs(leaf * 1, _targets(), WHOLE, temperature=0.6, entropy_gradient=entropy_gradient)
    (got[0] + entropy_gradient * 0.3 * got[1]).sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert leaf.grad.dtype == torch.bfloat16
    assert ((leaf.grad.double() - exact.grad).abs() <= 2**-8 * exact.grad.abs() + 2e-6).all()


def test_backward_is_in_place_and_runs_once():
    """The gradient takes the logits' storage; a second backward would read a gradient as logits."""
    leaf = _logits().requires_grad_()
    logits = leaf * 1.0
    storage = logits.data_ptr()
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    loss = log_probs(logits, _targets(), WHOLE, temperature=1.0)[0].sum()
    loss.backward(retain_graph=True)
    assert seen == [storage]
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_rows_without_a_target_are_not_read():
    logits = _logits()
    logits[[0, 5]] = torch.nan
    target = _targets()
    target[[0, 5]] = NO_TARGET
    got = token_scores(logits, target, WHOLE, temperature=1.0)
    assert got.logprob_T.isfinite().all()
    assert got.entropy_T[[0, 5]].tolist() == [0.0, 0.0]


def test_no_target_at_all_still_has_a_zero_gradient():
    leaf = _logits().requires_grad_()
    log_probs(leaf * 1.0, torch.full((12,), NO_TARGET), WHOLE, temperature=1.0)[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.eq(0).all()


def test_sensitivity_is_the_entropy_change_of_a_policy_gradient_step():
    """Against finite differences: dx = eta A (e_y - p) on the logits gives dH = -eta A S + O(eta^2)."""
    logits, target = _logits().double(), _targets()
    sensitivity = token_scores(logits.float(), target, WHOLE, temperature=1.0).sensitivity_T
    step = torch.nn.functional.one_hot(target, V) - logits.softmax(-1)
    for advantage in (1.0, -0.7):
        eta = 1e-4
        up, down = (_reference(logits + sign * eta * advantage * step, target, 1.0)[1] for sign in (1, -1))
        torch.testing.assert_close((up - down) / (2 * eta), -advantage * sensitivity.double(), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_sensitivity_is_zero_on_average_over_the_policy(tau):
    """E_{y~p}[S] = 0: every token of one row is a target once."""
    for row in _logits():
        many = row.expand(V, V)
        got = token_scores(many, torch.arange(V), WHOLE, temperature=tau)
        p = got.logprob_T.double().exp()
        assert abs(float((p * got.sensitivity_T.double()).sum())) < 1e-6


def _lambert_w0(x: float) -> float:
    """The w >= 0 with w e^w = x, by bisection."""
    low, high = 0.0, max(x, 1.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * math.exp(min(middle, 700)) < x else (low, middle)
    return low


@pytest.mark.parametrize("seed", [0, 1])
def test_sensitivity_changes_sign_at_the_critical_surprisal(seed):
    """s* = H - W0(B e^H) <= H: S > 0 below, S < 0 above, for every token of every row."""
    for row in _logits(seed=seed):
        got = token_scores(row.expand(V, V), torch.arange(V), WHOLE, temperature=1.0)
        surprisal, entropy = -got.logprob_T.double(), got.entropy_T[0].double()
        b = (surprisal.neg().exp() * (entropy - surprisal) - got.sensitivity_T.double()).mean()
        assert b >= 0
        critical = entropy - _lambert_w0(float(b * entropy.exp()))
        assert critical <= entropy
        clear = (surprisal - critical).abs() > 1e-3
        assert ((got.sensitivity_T < 0) == (surprisal > critical))[clear].all()


def test_a_target_that_cannot_be_drawn_has_the_sensitivity_of_infinite_surprisal():
    logits, target = _logits(), _targets()
    want = token_scores(logits.clone().index_fill_(1, target[:1], -60.0), target, WHOLE, temperature=1.0)
    logits[0, target[0]] = -torch.inf
    got = token_scores(logits, target, WHOLE, temperature=1.0)
    assert got.sensitivity_T.isfinite().all()
    assert float(got.sensitivity_T[0]) == pytest.approx(float(want.sensitivity_T[0]), abs=1e-7)
    assert got.sensitivity_T[0] < 0
