"""Log-probs straight from hidden states, in row chunks: the values and gradients of the whole, in bounded memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stare_megatron.trainer import logprobs_torch
from stare_megatron.trainer.logprobs import head_log_probs, head_token_scores, log_probs, token_scores
from stare_megatron.trainer.partials import NO_TARGET, VocabShard

T, H, V, PADDING = 40, 16, 1000, 24
WHOLE = VocabShard(0, V, None)


def _inputs(dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=g).to(dtype)
    weight = torch.randn(V + PADDING, H, generator=g).to(dtype)
    weight[V:] *= 50  # hostile padding
    target = torch.randint(0, V, (T,), generator=g)
    target[[0, 1, 2, 3, 17, 39]] = NO_TARGET  # with chunks of 3, the first has no target at all
    return hidden, weight, target


@pytest.mark.parametrize("chunk", [1, 3, 7, 40, 64])
@pytest.mark.parametrize("tau", [1.0, 0.6])
def test_scores_are_those_of_the_whole(chunk, tau):
    hidden, weight, target = _inputs()
    got = head_token_scores(hidden, weight, target, WHOLE, temperature=tau, chunk=chunk)
    want = token_scores(hidden @ weight.t(), target, WHOLE, temperature=tau)
    for name in ("logprob_T", "entropy_T", "sensitivity_T", "raw_logprob_T"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), atol=5e-6, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 40])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_against_float64(chunk, entropy_gradient):
    hidden, weight, target = _inputs()
    kept = target != NO_TARGET
    share = torch.linspace(-1, 1, T)

    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax((exact_hidden @ exact_weight[:V].t()) / 0.7, -1)
    logprob, entropy = logp.gather(1, target.clamp(0)[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    (share.double() * kept * (logprob + 0.3 * entropy_gradient * entropy)).sum().backward()

    hidden.requires_grad_()
    weight.requires_grad_()
    logprob, entropy = head_log_probs(
        hidden, weight, target, WHOLE, temperature=0.7, chunk=chunk, entropy_gradient=entropy_gradient
    )
    assert entropy.requires_grad is entropy_gradient
    (share * (logprob + 0.3 * entropy_gradient * entropy)).sum().backward()
    for got, want in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=1e-5)
    assert weight.grad is not None
    assert weight.grad[V:].eq(0).all()


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors made under it that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if not storage.nbytes() or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _peak(rows: int, columns: int, chunk: int) -> int:
    """Of a scoring pass, then a forward and backward; `chunk` 0 keeps all logits."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 8, generator=g, requires_grad=True)
    weight = torch.randn(columns, 8, generator=g, requires_grad=True)
    target, shard = torch.randint(0, columns, (rows,), generator=g), VocabShard(0, columns, None)
    with LiveBytes() as memory:
        if chunk:
            head_token_scores(hidden, weight, target, shard, temperature=1.0, chunk=chunk)
            head_log_probs(hidden, weight, target, shard, temperature=1.0, chunk=chunk)[0].sum().backward()
        else:
            with torch.no_grad():
                token_scores(hidden @ weight.t(), target, shard, temperature=1.0)
            log_probs(hidden @ weight.t(), target, shard, temperature=1.0)[0].sum().backward()
    return memory.peak


def test_peak_memory_is_bounded_by_the_chunk(monkeypatch):
    monkeypatch.setattr(logprobs_torch, "CHUNK_ELEMENTS", 4 * 4096)
    columns, chunk = 4096, 16
    logits = chunk * columns * 4
    scratch = 4 * 4 * columns * 4  # four buffers of four rows
    weight_gradient = 3 * columns * 8 * 4  # a chunk's, the sum, what is handed on
    small = _peak(256, columns, chunk)
    assert small < logits + scratch + weight_gradient + 256 * 512
    assert _peak(1024, columns, chunk) - small < 768 * 512  # bytes a row: hidden states and scalars, no logits
    assert _peak(256, columns, 0) > 256 * columns * 4 > 2 * small
    assert _peak(256, columns, 4 * chunk) > small + 2 * logits  # the measure sees the logits
