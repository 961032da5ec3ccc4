"""The Triton kernels against float64 and the PyTorch path, through the whole route: dispatch, merge, autograd.

On an NVIDIA GPU: `pytest -m gpu`. Without one the same cases run under Triton's interpreter, in a process of their own
(tests/unit/trainer/test_logprobs_triton.py). Tiles are made small, so that few columns still make many rescalings.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stare_megatron.trainer import logprobs, logprobs_torch, partials
from stare_megatron.trainer.logprobs import head_log_probs, head_token_scores, log_probs, token_scores
from stare_megatron.trainer.partials import NO_TARGET, VocabShard

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PLACE = "cpu" if INTERPRETED else "cuda"
T, V = 6, 400
WHOLE = VocabShard(0, V, None)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="neither GPU nor interpreter"),
]


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    """The kernels' module, with 128 columns of fp32 a step, and a block of the backward."""
    from stare_megatron.trainer import logprobs_triton

    monkeypatch.setattr(logprobs_triton, "LANES", 32)
    monkeypatch.setattr(logprobs_triton, "BACKWARD_BLOCK", 128)
    assert logprobs.kernels(torch.zeros(1, 1, device=PLACE)) is logprobs_triton
    return logprobs_triton


def _logits(rows: int = T, columns: int = V, seed: int = 0) -> torch.Tensor:
    """Peaked and flat rows, as a language model makes them."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=g) * torch.linspace(0.2, 6.0, rows)[:, None]).to(PLACE)


def _targets(rows: int = T, columns: int = V) -> torch.Tensor:
    return torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(1)).to(PLACE)


def _exact(logits, target, tau):
    """Log-prob, entropy, sensitivity, raw log-prob by their definitions, in float64."""
    logp = torch.log_softmax(logits.double() / tau, -1)
    finite = logp.clamp(min=-1e3)
    p = logp.exp()
    entropy = -(p * finite).sum(-1, keepdim=True)
    slope = p * (finite + entropy)
    at = target.clamp(0)[:, None]
    sensitivity = slope.gather(1, at)[:, 0] - (p * slope).sum(-1)
    raw = torch.log_softmax(logits.double(), -1).gather(1, at)[:, 0]
    return logp.gather(1, at)[:, 0], entropy[:, 0], sensitivity, raw


def _values(scores):
    return scores.logprob_T, scores.entropy_T, scores.sensitivity_T, scores.raw_logprob_T


def _close(got, want, atol=2e-6):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("offset", "tau"), [(0.0, 1.0), (0.0, 0.6), (300.0, 1.7), (-300.0, 0.6), (1e4, 1.0), (-1e4, 0.6), (1e4, 1.7)]
)
def test_float64_reference(offset, tau):
    logits, target = _logits() + offset, _targets()
    for got, want in zip(
        _values(token_scores(logits, target, WHOLE, temperature=tau)), _exact(logits, target, tau), strict=True
    ):
        _close(got, want)


@pytest.mark.parametrize("columns", [1, 7, 127, 128, 129, 260])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_columns(columns, dtype):
    logits, target = _logits(2, columns).to(dtype), _targets(2, columns)
    shard = VocabShard(0, columns, None)
    for got, want in zip(
        _values(token_scores(logits, target, shard, temperature=0.8)), _exact(logits, target, 0.8), strict=True
    ):
        _close(got, want)


@pytest.mark.parametrize(("sensitivity", "raw"), [(False, False), (True, False), (False, True), (True, True)])
def test_partials_are_those_of_the_pytorch_path(triton_path, sensitivity, raw):
    logits, target = _logits(), _targets()
    target[[0, 5]] = NO_TARGET
    pair = [
        path.partials(logits, target, WHOLE, 0.7, sensitivity=sensitivity, raw=raw)
        for path in (triton_path, logprobs_torch)
    ]
    torch.testing.assert_close(pair[0], pair[1], atol=2e-6, rtol=2e-6)
    assert pair[0][:, 0].tolist() == [-torch.inf, 0.0, 0.0, -torch.inf] + [0.0] * (2 * sensitivity + raw)


def _sharded(triton_path, logits, target, tau, size, padding):
    """What `size` tensor-parallel ranks compute, the last ones holding hostile padding."""
    hostile = torch.full((logits.shape[0], padding), 1e4, device=PLACE)
    parts = torch.cat([logits, hostile], 1).chunk(size, 1)  # rows further apart than they are long
    width = parts[0].shape[1]
    known = [
        triton_path.partials(
            part,
            target,
            VocabShard(i * width, min(max(V - i * width, 0), width), None),
            tau,
            sensitivity=True,
            raw=True,
        )
        for i, part in enumerate(parts)
    ]
    return partials.token_values(partials.combine(torch.stack(known), tau), target, tau)


@pytest.mark.parametrize(("size", "padding"), [(1, 24), (2, 24), (4, 240), (8, 880)])
def test_vocabulary_shards_and_hostile_padding(triton_path, size, padding):
    """With (4, 240) the third holds 80 columns, the last none; with (8, 880) four ranks hold nothing else."""
    logits, target = _logits(), _targets()
    got = _sharded(triton_path, logits, target, 0.6, size, padding)
    for value, want in zip(_values(got), _exact(logits, target, 0.6), strict=True):
        _close(value, want)


@pytest.mark.parametrize("size", [1, 4])
def test_masked_vocabulary_gives_no_nan(triton_path, size):
    """Half of the columns -inf; in some rows whole steps of every lane, and all columns of some ranks; some targets."""
    logits, target = _logits(), _targets(columns=100)
    mask = torch.rand(logits.shape, generator=torch.Generator().manual_seed(5)).to(PLACE) < 0.5
    mask[3, V // 2 :] = True
    mask[4, : V // 4] = True
    logits[mask] = -torch.inf
    want = _exact(logits, target, 0.7)
    assert torch.isinf(want[0]).any()
    for value, exact in zip(_values(_sharded(triton_path, logits, target, 0.7, size, 0)), want, strict=True):
        _close(value, exact)


@pytest.mark.parametrize("low", [-1e5, -1e9, torch.finfo(torch.bfloat16).min, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(dtype, low):
    """In most lanes, all that they take in."""
    logits, target = _logits(columns=4 * V).to(dtype), _targets(columns=40)
    logits[:, 40:] = low
    scores = token_scores(logits, target, VocabShard(0, 4 * V, None), temperature=0.7)
    for got, want in zip(_values(scores), _exact(logits, target, 0.7), strict=True):
        _close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_logit_is_not_hidden(dtype):
    logits = _logits().to(dtype)
    logits[2, 7] = torch.nan
    for value in _values(token_scores(logits, _targets(), WHOLE, temperature=0.7)):
        assert value.isnan().nonzero().tolist() == [[2]]


def _gradients(logits, target, tau, entropy_gradient, shard=WHOLE):
    """(ours of all columns, float64's of the valid ones) of a sum weighted by row."""
    weight = torch.linspace(-1, 1, logits.shape[0], device=PLACE)
    kept = target != NO_TARGET
    exact = logits[:, : shard.valid].double().requires_grad_()
    logp = torch.log_softmax(exact / tau, -1)
    entropy = -(logp.exp() * logp.clamp(min=-1e3)).sum(-1)
    logprob = logp.gather(1, target.clamp(0)[:, None])[:, 0]
    (weight * kept * (logprob + entropy_gradient * 0.3 * entropy)).sum().backward()

    leaf = logits.clone().requires_grad_()
    working = leaf * 1.0
    storage, handed_on = working.data_ptr(), []
    working.register_hook(lambda g: handed_on.append(g.data_ptr()))
    got = log_probs(working, target, shard, temperature=tau, entropy_gradient=entropy_gradient)
    assert got[1].requires_grad is entropy_gradient
    (weight * (got[0] + entropy_gradient * 0.3 * got[1])).sum().backward()
    assert handed_on == [storage]
    assert leaf.grad is not None
    assert exact.grad is not None
    return leaf.grad, exact.grad


@pytest.mark.parametrize(("tau", "offset"), [(1.0, 0.0), (0.6, -1e4), (1.7, 300.0)])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradient(entropy_gradient, tau, offset):
    logits = torch.cat([_logits() + offset, torch.full((T, 40), 1e4, device=PLACE)], 1)
    target = _targets()
    target[[1, 4]] = NO_TARGET
    got, want = _gradients(logits, target, tau, entropy_gradient)
    _close(got[:, :V], want)
    assert got[:, V:].eq(0).all()
    assert got[target == NO_TARGET].eq(0).all()


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_bf16_loses_only_its_own_rounding(entropy_gradient):
    """Scores within 2e-6 of float64 on the same logits; each gradient is the nearest bf16 to one within 2e-6
    (the interpreter cuts off where hardware rounds)."""
    logits, target = _logits().bfloat16(), _targets()
    for got, want in zip(
        _values(token_scores(logits, target, WHOLE, temperature=0.6)), _exact(logits, target, 0.6), strict=True
    ):
        _close(got, want)
    target[1] = NO_TARGET
    got, want = _gradients(logits, target, 0.6, entropy_gradient)
    assert got.dtype == torch.bfloat16
    assert got[1].eq(0).all()
    assert ((got.double() - want).abs() <= (2**-7 if INTERPRETED else 2**-8) * want.abs() + 2e-6).all()


def test_gradient_under_a_mask_is_finite():
    logits = _logits()
    logits[:, 200:] = -torch.inf
    got, want = _gradients(logits, _targets(columns=200), 0.8, True)
    _close(got, want.nan_to_num(0.0))
    assert got[:, 200:].eq(0).all()


def test_rows_without_a_target_are_not_read():
    logits, target = _logits(), _targets()
    logits[[0, 5]] = torch.nan
    target[[0, 5]] = NO_TARGET
    got = token_scores(logits, target, WHOLE, temperature=1.0)
    for value in _values(got):
        assert value.isfinite().all()
        assert value[[0, 5]].tolist() == [0.0, 0.0]
    leaf = logits.requires_grad_()
    log_probs(leaf * 1.0, target, WHOLE, temperature=1.0)[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_no_target_at_all_and_no_row_at_all():
    leaf = _logits().requires_grad_()
    nothing = torch.full((T,), NO_TARGET, device=PLACE)
    log_probs(leaf * 1.0, nothing, WHOLE, temperature=1.0)[0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.eq(0).all()
    empty = torch.zeros(0, V, device=PLACE, requires_grad=True)
    logprob, _ = log_probs(empty * 1.0, nothing[:0], WHOLE, temperature=1.0)
    logprob.sum().backward()
    assert logprob.shape == (0,)
    assert token_scores(empty, nothing[:0], WHOLE, temperature=0.7).entropy_T.shape == (0,)


def test_an_empty_shard(triton_path):
    """A tensor-parallel rank whose columns are all padding."""
    logits, target, shard = torch.full((T, 64), 1e4, device=PLACE), _targets(), VocabShard(V, 0, None)
    got = triton_path.partials(logits, target, shard, 0.7, sensitivity=True, raw=True)
    assert got[:, 0].tolist() == [-torch.inf, 0.0, 0.0, -torch.inf, 0.0, 0.0, 0.0]
    whole = triton_path.partials(_logits(), target, WHOLE, 1.0, sensitivity=False, raw=False)
    row = partials.merged(whole.double())
    triton_path.backward_in_place(logits, torch.ones(T, device=PLACE), None, target, row, shard, 1.0)
    assert logits.eq(0).all()


def test_rows_apart_in_memory():
    """The columns between the rows of a view stay as they are."""
    wide = torch.cat([_logits(), torch.full((T, 40), 7.0, device=PLACE)], 1)
    view, target = wide[:, :V], _targets()
    _close(token_scores(view, target, WHOLE, temperature=1.0).logprob_T, _exact(view, target, 1.0)[0])
    row = partials.merged(logprobs_torch.partials(view, target, WHOLE, 1.0, sensitivity=False, raw=False).double())
    logprobs.kernels(view).backward_in_place(view, torch.ones(T, device=PLACE), None, target, row, WHOLE, 1.0)
    _close(view.sum(1), torch.zeros(T, device=PLACE), atol=1e-5)  # a log-prob's gradient sums to 0
    assert wide[:, V:].eq(7.0).all()


def test_columns_apart_in_memory_take_the_pytorch_path():
    logits = _logits().t().contiguous().t()
    assert logprobs.kernels(logits) is logprobs_torch


@pytest.mark.parametrize("chunk", [5, T])
def test_chunked_head(monkeypatch, chunk):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, 16, generator=g).to(PLACE), torch.randn(V + 24, 16, generator=g).to(PLACE)
    weight[V:] *= 50  # hostile padding
    target = _targets()
    target[[0, 1, 2, 3, 4]] = NO_TARGET  # with chunks of 5, the first has no target at all

    def both():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        scores = head_token_scores(hidden, weight, target, WHOLE, temperature=0.7, chunk=chunk)
        logprob, entropy = head_log_probs(*leaves, target, WHOLE, temperature=0.7, chunk=chunk, entropy_gradient=True)
        (logprob - 0.3 * entropy).sum().backward()
        return [*_values(scores), *(x.grad for x in leaves)]

    ours = both()
    monkeypatch.setenv("STARE_TRITON", "0")
    for got, want in zip(ours, both(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class NoWait(TorchDispatchMode):
    """Refuses operators whose result the host must read: scalars, and shapes that depend on values."""

    WAITS = frozenset(
        {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero"}
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, name
        if name in ("index", "index_put", "index_put_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits():
    target = _targets()
    target[3] = NO_TARGET
    leaf = _logits().requires_grad_()
    with NoWait():
        token_scores(leaf.detach(), target, WHOLE, temperature=0.7)
        logprob, entropy = log_probs(leaf * 1.0, target, WHOLE, temperature=0.7, entropy_gradient=True)
        (logprob + entropy).sum().backward()
    with NoWait(), pytest.raises(AssertionError, match="nonzero"):  # the check sees the PyTorch path's wait
        logprobs_torch.partials(leaf.detach(), target, WHOLE, 0.7, sensitivity=False, raw=False)
