"""Part `kernels`: log-prob, entropy and sensitivity, forward and backward, against float64; and how fast they read."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, NamedTuple

from tools.gpu_check_parts.outcome import Context, Outcome

if TYPE_CHECKING:
    import torch

# Nats. Half a unit in the last place of fp32 is more than that at a log-prob of -66, hence the second.
_ABSOLUTE, _RELATIVE = 2e-6, 2.0**-24
_PADDING = 64
_TEMPERATURE = 0.7


class _Size(NamedTuple):
    rows: int
    vocab: int
    timed_rows: int
    repeats: int


_ON_GPU, _ON_CPU = _Size(64, 151_936, 8192, 5), _Size(3, 2048, 4, 1)


def check(context: Context) -> Outcome:
    """On a CPU the kernels are interpreted where Triton is there, else the PyTorch path is looked at; times mean
    nothing then."""
    if not context.on_gpu and importlib.util.find_spec("triton") is not None:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    from stare_megatron.trainer import logprobs, logprobs_torch

    size = _ON_GPU if context.on_gpu else _ON_CPU
    outcome = Outcome()
    on_path = logprobs.kernels(torch.zeros(1, 8, device=context.device))
    outcome.numbers["path"] = "PyTorch" if on_path is logprobs_torch else "Triton"
    if context.on_gpu:
        outcome.require(on_path is not logprobs_torch, "the Triton kernels do not serve this GPU")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        _accuracy(outcome, context, size, dtype)
    _speed(outcome, size)
    return outcome


def _accuracy(outcome: Outcome, context: Context, size: _Size, dtype: torch.dtype) -> None:
    """Hostile padding after the vocabulary; half of every second row masked."""
    import torch

    from stare_megatron.trainer.logprobs import log_probs, token_scores
    from stare_megatron.trainer.partials import VocabShard

    g = torch.Generator(context.device).manual_seed(0)
    shape = (size.rows, size.vocab + _PADDING)
    logits = torch.randn(shape, generator=g, device=context.device)
    logits *= torch.linspace(0.2, 6.0, size.rows, device=context.device)[:, None]
    target = torch.randint(0, size.vocab, (size.rows,), generator=g, device=context.device)
    mask = torch.rand(shape, generator=g, device=context.device) < 0.5
    mask[1::2] = False
    logits[mask.scatter_(1, target[:, None], False)] = -torch.inf
    logits[:, size.vocab :] = 1e4
    logits, shard, at = logits.to(dtype), VocabShard(0, size.vocab, None), target[:, None]

    exact = logits[:, : size.vocab].double().requires_grad_()
    logp = torch.log_softmax(exact / _TEMPERATURE, -1)
    p, finite = logp.exp(), logp.clamp(min=-1e30)
    entropy = -(p * finite).sum(-1)
    slope = p * (finite + entropy[:, None])
    logprob = logp.gather(1, at)[:, 0]
    want = (logprob, entropy, slope.gather(1, at)[:, 0] - (p * slope).sum(-1))
    got = token_scores(logits, target, shard, temperature=_TEMPERATURE)
    name = str(dtype).removeprefix("torch.")
    for what, mine, theirs in zip(
        ("log-prob", "entropy", "sensitivity"), (got.logprob_T, got.entropy_T, got.sensitivity_T), want, strict=True
    ):
        excess = (mine.double() - theirs.detach()).abs() - _RELATIVE * theirs.detach().abs()
        outcome.near(f"{name} {what}, error", float(excess.max().clamp(min=0.0)), 0.0, _ABSOLUTE)

    (logprob + 0.3 * entropy).sum().backward()
    assert exact.grad is not None
    gradient = exact.grad.nan_to_num(0.0)
    leaf = logits.clone().requires_grad_()
    mine = log_probs(leaf * 1.0, target, shard, temperature=_TEMPERATURE, entropy_gradient=True)
    (mine[0] + 0.3 * mine[1]).sum().backward()
    assert leaf.grad is not None
    # Rounding costs half a unit of the dtype; Triton's interpreter cuts bfloat16 off, which costs a whole one.
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    rounding = (1 if context.on_gpu else 2) * unit * gradient.abs()
    excess = (leaf.grad[:, : size.vocab].double() - gradient).abs() - rounding
    outcome.near(f"{name} gradient, error", float(excess.max().clamp(min=0.0)), 0.0, _ABSOLUTE)
    outcome.require(not leaf.grad[:, size.vocab :].any(), f"{name}: padding has a gradient")


def _speed(outcome: Outcome, size: _Size) -> None:
    import torch

    from tools import bench_logprobs as bench

    source, target, exact = bench.batch(size.timed_rows, size.vocab, torch.bfloat16)
    moved = source.numel() * source.element_size()
    bandwidth = bench.copy_bandwidth(source, size.repeats)
    outcome.numbers["a copy, GB/s"] = bandwidth / 1e9
    for name, form in bench.forms_of_ours().items():
        cost = bench.measure(form, source, target, exact, size.repeats)
        seen = {"forward, ms": 1e3 * cost.forward, "forward, % of a copy": 100 * moved / bandwidth / cost.forward}
        if "scoring" not in name:
            seen |= {
                "backward, ms": 1e3 * cost.backward,
                "backward, % of a copy": 200 * moved / bandwidth / cost.backward,
            }
        outcome.numbers[name] = seen | {"peak beyond the logits, MiB": cost.peak / 2**20}
