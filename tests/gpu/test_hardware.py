"""What only a GPU can show of the kernels: real tiles at a real vocabulary, 64-bit offsets, memory, a host that never
waits."""

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.selection import select_top
from stare_megatron.trainer import logprobs, logprobs_torch
from stare_megatron.trainer.logprobs import log_probs, token_scores
from stare_megatron.trainer.partials import NO_TARGET, VocabShard

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

V, PADDING = 151_936, 128
WHOLE = VocabShard(0, V, None)


def _batch(rows: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """LLM-like logits with hostile padding, half of every second row masked; every fifth row without a target."""
    g = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(rows, V + PADDING, generator=g, device="cuda")
    logits *= torch.linspace(0.2, 6.0, rows, device="cuda")[:, None]
    logits += offset
    target = torch.randint(0, V, (rows,), generator=g, device="cuda")
    mask = torch.rand(logits.shape, generator=g, device="cuda") < 0.5
    mask[1::2] = False
    logits[mask.scatter_(1, target[:, None], False)] = -torch.inf
    logits[:, V:] = 1e5
    target[::5] = NO_TARGET
    return logits.to(dtype), target


def _exact(logits, target, tau):
    """Log-prob, entropy, sensitivity in float64; 0 where there is no target."""
    logp = torch.log_softmax(logits[:, :V].double() / tau, -1)
    p, finite = logp.exp(), logp.clamp(min=-1e30)
    entropy = -torch.where(p > 0, p * finite, 0.0).sum(-1)
    slope = torch.where(p > 0, p * (finite + entropy[:, None]), 0.0)
    at = target.clamp(0)[:, None]
    values = logp.gather(1, at)[:, 0], entropy, slope.gather(1, at)[:, 0] - (p * slope).sum(-1)
    return tuple(torch.where(target != NO_TARGET, x, 0.0) for x in values)


@pytest.mark.parametrize("rows", [3, 64, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "tau"), [(0.0, 1.0), (300.0, 0.6), (-300.0, 1.7), (1e4, 1.0), (-1e4, 0.7)])
def test_scores(rows, dtype, offset, tau):
    """From less than a program a processor to several waves of them."""
    logits, target = _batch(rows, dtype, offset)
    assert logprobs.kernels(logits) is not logprobs_torch
    got = token_scores(logits, target, WHOLE, temperature=tau)
    for value, want in zip((got.logprob_T, got.entropy_T, got.sensitivity_T), _exact(logits, target, tau), strict=True):
        # Half a unit in the last place of fp32 is more than that at a log-prob of -66.
        torch.testing.assert_close(value.double(), want, atol=2e-6, rtol=2**-24)


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient(dtype, entropy_gradient):
    logits, target = _batch(40, dtype)
    exact = logits[:, :V].double().requires_grad_()
    logp = torch.log_softmax(exact / 0.7, -1)
    entropy = -torch.where(logp.exp() > 0, logp.exp() * logp.clamp(min=-1e30), 0.0).sum(-1)
    logprob = logp.gather(1, target.clamp(0)[:, None])[:, 0]
    ((target != NO_TARGET) * (logprob + 0.3 * entropy_gradient * entropy)).sum().backward()
    assert exact.grad is not None
    want = exact.grad.nan_to_num(0.0)

    leaf = logits.clone().requires_grad_()
    got = log_probs(leaf * 1.0, target, WHOLE, temperature=0.7, entropy_gradient=entropy_gradient)
    (got[0] + 0.3 * entropy_gradient * got[1]).sum().backward()
    assert leaf.grad is not None
    rounding = 2**-8 * want.abs() if dtype is torch.bfloat16 else 0.0
    assert ((leaf.grad[:, :V].double() - want).abs() <= 2e-6 + rounding).all()
    assert leaf.grad[:, V:].eq(0).all()
    assert leaf.grad[target == NO_TARGET].eq(0).all()


def test_more_than_two_to_the_31_logits():
    """Offsets are 64-bit, and no second tensor of the logits' size is made."""
    rows = 2**31 // V + 200
    logits = torch.zeros(rows, V, dtype=torch.bfloat16, device="cuda")
    last, target = _batch(8, torch.bfloat16)
    logits[-8:] = last[:, :V]
    targets = torch.full((rows,), NO_TARGET, device="cuda")
    targets[-8:] = target
    want = _exact(last, target, 1.0)
    leaf = logits.requires_grad_()
    working = leaf.view_as(leaf)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    logprob, entropy = log_probs(working, targets, WHOLE, temperature=1.0)
    torch.testing.assert_close(logprob[-8:].double(), want[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(entropy[-8:].double(), want[1], atol=2e-6, rtol=0)
    (grad,) = torch.autograd.grad(logprob.sum(), working)
    assert torch.cuda.max_memory_allocated() - held < logits.nbytes // 100
    assert grad[:-8].count_nonzero() == 0
    assert grad[-8:].count_nonzero() > 0


def test_the_host_never_waits():
    """Neither in scoring, nor in the gradient, nor in selection."""
    logits, target = _batch(64, torch.bfloat16)
    leaf = logits.requires_grad_()
    g = torch.Generator("cuda").manual_seed(0)
    value = torch.rand(10_000, generator=g, device="cuda")
    subset = torch.randint(0, 3, (10_000,), generator=g, device="cuda")
    ids = torch.arange(10_000, device="cuda")

    def everything():
        token_scores(leaf.detach(), target, WHOLE, temperature=0.7)
        logprob, entropy = log_probs(leaf * 1.0, target, WHOLE, temperature=0.7, entropy_gradient=True)
        (logprob + entropy).sum().backward()
        return select_top(value, subset, ids, 0.1, OneRank())

    everything()  # compilation may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = select_top(value.cpu(), subset.cpu(), ids.cpu(), 0.1, OneRank())
    assert torch.equal(chosen.selected_T.cpu(), on_cpu.selected_T)
