"""Log-prob and entropy of LLM-like logits: ours against what is usually done, in one run on this machine.

python tools/bench_logprobs.py [--rows 256] [--vocab 151936] [--dtype bfloat16] [--repeats 5]

Peers are imported where they are installed; otherwise their formula is written out below and named "(formula)". Every
form gives log-probs of the same rows and their gradient; without "+ entropy" it gives no entropy. On a CPU the peak is
that of live tensors; on a GPU that of the allocator.

"memory" counts operands of operators that lie in a storage larger than 16 MiB, per row and column: those that no cache
holds. The row chunks in which ours works on a CPU are smaller, so only its passes over the logits count.
Gathers and scatters of a few elements count nothing. The bandwidth of a plain copy is measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stare_megatron import device
from stare_megatron.run_folder import hardware
from stare_megatron.trainer.logprobs import log_probs, token_scores
from stare_megatron.trainer.partials import VocabShard

_CACHED = 16 << 20  # bytes
_UNREAD = {"new_zeros", "new_empty", "empty_like", "zeros_like", "copy_", "fill_", "zero_"}  # of their first operand
_FEW = {"detach", "gather", "scatter", "scatter_add", "scatter_add_", "index", "index_put_", "index_select"}

Outputs = tuple[torch.Tensor, ...]  # log-probs first
Form = Callable[[torch.Tensor, torch.Tensor], Outputs]


class Counter(TorchDispatchMode):
    """`moved`: bytes of operands in large storages; `peak`: most bytes of new tensors alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_iter((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FEW:
            counted = tensors[1:] if name in _UNREAD else tensors
            self.moved += sum(x.numel() * x.element_size() for x in counted if x.untyped_storage().nbytes() > _CACHED)
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if storage.nbytes() and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


class _VerlEntropy(torch.autograd.Function):
    """The formula of verl's vocab_parallel_entropy (verl/utils/megatron/tensor_parallel.py), at TP 1."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        top = logits.max(-1, keepdim=True).values
        exponential = (logits - top).exp_()
        total = exponential.sum(-1, keepdim=True)
        softmax = exponential.div_(total)
        mean = (softmax * logits).sum(-1, keepdim=True)
        ctx.save_for_backward(logits, softmax, mean)
        return (top + total.log() - mean).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        logits, softmax, mean = ctx.saved_tensors
        return grads[0][:, None] * softmax * (mean - logits)


class _CrossEntropy(torch.autograd.Function):
    """The formula of Megatron-Core's vocab_parallel_cross_entropy, at TP 1; it writes over its fp32 input."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits -= logits.max(-1, keepdim=True).values
        predicted = logits.gather(1, target[:, None])[:, 0]
        total = logits.exp_().sum(-1)
        loss = total.log() - predicted
        logits.div_(total[:, None])
        ctx.save_for_backward(logits, target)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax, target = ctx.saved_tensors
        grad = softmax
        grad[torch.arange(len(target), device=grad.device), target] -= 1.0
        return grad.mul_(grads[0][:, None]), None


def plain(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
    """log_softmax, gather, and the entropy by its definition."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def verl(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
    """As verl's Megatron actor: the entropy first, then the cross entropy of a clone, both of fp32 logits."""
    wide = logits.float()
    entropy = _VerlEntropy.apply(wide)
    return -_CrossEntropy.apply(wide.clone(), target), entropy


def megatron_formula(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
    return (-_CrossEntropy.apply(logits.to(torch.float32, copy=True), target),)


def _megatron() -> tuple[str, Form]:
    """Megatron-Core's own function in a process group of one; its formula if it is not installed."""
    try:
        from stare_megatron.config import TrainerConfig
        from stare_megatron.trainer import parallel

        parallel.initialize(
            TrainerConfig.model_validate({}),
            rank=0,
            world_size=1,
            local_rank=0,
            master_addr="127.0.0.1",
            master_port=int(os.environ.get("MASTER_PORT", "29517")),
            seed=0,
            timeout_s=60,
        )
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    except ImportError:
        return "Megatron-Core (formula), no entropy", megatron_formula
    return (
        "Megatron-Core, no entropy",
        # It writes over what it is given after a conversion that is none for fp32.
        lambda logits, target: (-vocab_parallel_cross_entropy(logits.to(torch.float32, copy=True), target),),
    )


def forms() -> dict[str, Form]:
    """By name, ours last; all but "ours + entropy" differentiate the entropy they give."""
    name, megatron = _megatron()
    return {"plain PyTorch + entropy": plain, "verl (formula) + entropy": verl, name: megatron} | forms_of_ours()


def forms_of_ours() -> dict[str, Form]:

    def ours(entropy_gradient: bool) -> Form:
        return lambda logits, target: log_probs(
            logits,
            target,
            VocabShard(0, logits.shape[1], None),
            temperature=1.0,
            entropy_gradient=entropy_gradient,
        )

    def scores(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
        got = token_scores(logits, target, VocabShard(0, logits.shape[1], None), temperature=1.0)
        return got.logprob_T, got.entropy_T, got.sensitivity_T

    return {
        "ours, scoring: + entropy + sensitivity": scores,
        "ours + entropy": ours(False),
        "ours + entropy and its gradient": ours(True),
    }


@dataclass(frozen=True)
class Cost:
    """Seconds (median), bytes through memory, peak bytes beyond the logits, largest error against float64 in nats."""

    forward: float
    backward: float
    moved: int
    peak: int
    error: float


def measure(form: Form, source: torch.Tensor, target: torch.Tensor, exact: torch.Tensor | float, repeats: int) -> Cost:
    """`form` on fresh copies of the logits `source` [T, V]; one more run under the counters."""
    times = []
    for _ in range(repeats + 1):
        leaf = source.clone().requires_grad_()
        logits = leaf.view_as(leaf)
        _synchronize()
        start = time.perf_counter()
        outputs = form(logits, target)
        _synchronize()
        middle = time.perf_counter()
        _backward(outputs)
        _synchronize()
        times.append((middle - start, time.perf_counter() - middle))
        error = float((outputs[0].detach().double() - exact).abs().max())
        del outputs, logits, leaf
    logits = source.clone().requires_grad_()
    logits = logits.view_as(logits)
    on_gpu = device.current() is device.Device.CUDA
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with Counter() as counter:
        _backward(form(logits, target))
    peak = torch.cuda.max_memory_allocated() - held if on_gpu else counter.peak  # type: ignore[possibly-undefined]
    forward, backward = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return Cost(forward, backward, counter.moved, peak, error)


def _backward(outputs: Outputs) -> None:
    wanted = [x.sum() for x in outputs if x.requires_grad]
    if wanted:
        torch.stack(wanted).sum().backward()


def _synchronize() -> None:
    if device.current() is device.Device.CUDA:
        torch.cuda.synchronize()


def copy_bandwidth(source: torch.Tensor, repeats: int) -> float:
    """Bytes a second read and written by a plain copy of the logits."""
    into, times = torch.empty_like(source), []
    for _ in range(repeats + 1):
        _synchronize()
        start = time.perf_counter()
        into.copy_(source)
        _synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / statistics.median(times[1:])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=256)
    options.add_argument("--vocab", type=int, default=151_936)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--repeats", type=int, default=5)
    asked = options.parse_args()
    place = device.torch_device(0)
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 5.0, asked.rows)[:, None]
    source = (torch.randn(asked.rows, asked.vocab, generator=generator) * scale).to(place, getattr(torch, asked.dtype))
    target = source.float().softmax(-1).cpu().multinomial(1, generator=generator)[:, 0].to(place)
    rows = source.split(16)
    exact = torch.cat([torch.log_softmax(x.double(), -1) for x in rows]).gather(1, target[:, None])[:, 0]
    console = Console(width=130)
    console.print(f"{hardware()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    logits_bytes = source.numel() * source.element_size()
    console.print(f"{asked.rows} x {asked.vocab} {asked.dtype} logits, {logits_bytes / 2**20:.0f} MiB")
    bandwidth = copy_bandwidth(source, asked.repeats)
    console.print(f"a copy reads and writes {bandwidth / 1e9:.1f} GB/s")
    table = Table("form", "forward ms", "backward ms", "x plain", "B memory", "peak MiB", "of plain", "error")
    first: Cost | None = None
    for name, form in forms().items():
        cost = measure(form, source, target, exact, asked.repeats)
        first = first or cost
        table.add_row(
            name,
            f"{cost.forward * 1e3:.1f}",
            f"{cost.backward * 1e3:.1f}",
            f"{(first.forward + first.backward) / (cost.forward + cost.backward):.2f}",
            f"{cost.moved / source.numel():.1f}",
            f"{cost.peak / 2**20:.1f}",
            f"{cost.peak / first.peak:.2f}",
            f"{cost.error:.1e}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
