"""Log-prob and entropy of LLM-like logits: ours against what is usually done, in one run on this machine.

python tools/bench_logprobs.py [--rows N] [--vocab 151936] [--dtype bfloat16] [--repeats 5]

Peers are imported where they are installed; otherwise their formula is written out below and named "(formula)". Every
form gives log-probs of the same rows and their gradient; without "+ entropy" it gives no entropy. On a CPU the peak is
that of live tensors; on a GPU that of the allocator, and times are the GPU's own, its queue filled ahead. Ours uses the
Triton kernels where they serve (`STARE_TRITON=0`: the PyTorch path).

"of copy": the least that must move (forward one read of the logits, backward a read and a write) at the bandwidth of a
plain copy, measured in the same run, in percent of the time taken.

"memory" counts operands of operators that lie in a storage larger than 16 MiB, per row and column: those that no cache
holds. The row chunks in which ours works on a CPU are smaller, so only its passes over the logits count.
Gathers and scatters of a few elements count nothing. Of a Triton kernel, which no operator shows, what it is built to
move is counted: a read of the logits, or a read and a write.
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
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from stare_megatron.host import device
from stare_megatron.run.folder import hardware
from stare_megatron.trainer import logprobs_torch
from stare_megatron.trainer.logprobs import kernels, log_probs, token_scores
from stare_megatron.trainer.partials import VocabShard

_CACHED = 16 << 20  # bytes
_AHEAD = 10_000_000  # cycles a GPU is kept busy while the host fills its queue: some milliseconds
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
        outputs, forward = _timed(lambda logits=logits: form(logits, target))
        times.append((forward, _timed(lambda outputs=outputs: _backward(outputs))[1]))
        error = float((outputs[0].detach().double() - exact).abs().max())
        del outputs, logits, leaf
    logits = source.clone().requires_grad_()
    logits = logits.view_as(logits)
    on_gpu = device.current() is device.Device.CUDA
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    with Counter() as counter:
        moved = _moved_by_kernels(lambda: _backward(form(logits, target)), logits)
    peak = torch.cuda.max_memory_allocated() - held if on_gpu else counter.peak  # type: ignore[possibly-undefined]
    forward, backward = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return Cost(forward, backward, counter.moved + moved, peak, error)


def _moved_by_kernels(work: Callable[[], None], logits: torch.Tensor) -> int:
    """Bytes moved by Triton kernels, which the counter cannot see: by design, times how often they ran."""
    path = kernels(logits)
    with (
        mock.patch.object(path, "partials", wraps=path.partials) as reads,
        mock.patch.object(path, "backward_in_place", wraps=path.backward_in_place) as writes,
    ):
        work()
    passes = 0 if path is logprobs_torch else reads.call_count + 2 * writes.call_count
    return passes * logits.numel() * logits.element_size()


def _backward(outputs: Outputs) -> None:
    wanted = [x.sum() for x in outputs if x.requires_grad]
    if wanted:
        torch.stack(wanted).sum().backward()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and its seconds. On a GPU between two marks in a queue that is kept busy until the host has
    filled it, so that neither launches nor Python count."""
    if device.current() is not device.Device.CUDA:
        start = time.perf_counter()
        return work(), time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_AHEAD)
    begin.record()
    done = work()
    end.record()
    torch.cuda.synchronize()
    return done, begin.elapsed_time(end) / 1e3


def copy_bandwidth(source: torch.Tensor, repeats: int) -> float:
    """Bytes a second read and written by a plain copy of the logits."""
    into = torch.empty_like(source)
    times = [_timed(lambda: into.copy_(source))[1] for _ in range(repeats + 1)]
    return 2 * source.numel() * source.element_size() / statistics.median(times[1:])


def batch(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LLM-like logits [T, V], targets drawn from them, and the targets' log-probs in float64."""
    place = device.torch_device(0)
    generator = torch.Generator(place).manual_seed(0)
    source = torch.empty(rows, vocab, dtype=dtype, device=place)
    target = torch.empty(rows, dtype=torch.int64, device=place)
    exact = torch.empty(rows, dtype=torch.float64, device=place)
    scale = torch.linspace(0.5, 5.0, rows, device=place)[:, None]
    for begin in range(0, rows, 16):
        some = slice(begin, begin + 16)
        source[some] = torch.randn(source[some].shape, generator=generator, device=place) * scale[some]
        logp = torch.log_softmax(source[some].double(), -1)
        target[some] = logp.exp().multinomial(1, generator=generator)[:, 0]
        exact[some] = logp.gather(1, target[some, None])[:, 0]
    return source, target, exact


def main() -> None:
    on_gpu = device.current() is device.Device.CUDA
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=8192 if on_gpu else 256)
    options.add_argument("--vocab", type=int, default=151_936)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--repeats", type=int, default=5)
    asked = options.parse_args()
    source, target, exact = batch(asked.rows, asked.vocab, getattr(torch, asked.dtype))
    console = Console(width=130)
    console.print(f"{hardware()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    logits_bytes = source.numel() * source.element_size()
    console.print(f"{asked.rows} x {asked.vocab} {asked.dtype} logits, {logits_bytes / 2**20:.0f} MiB")
    bandwidth = copy_bandwidth(source, asked.repeats)
    path = "PyTorch path" if kernels(source) is logprobs_torch else "Triton kernels"
    console.print(f"a copy reads and writes {bandwidth / 1e9:.1f} GB/s; ours: {path}")
    columns = (
        "forward ms",
        "of copy",
        "backward ms",
        "of copy",
        "x plain",
        "B memory",
        "peak MiB",
        "of plain",
        "error",
    )
    table = Table("form", *columns)
    first: Cost | None = None
    for name, form in forms().items():
        cost = measure(form, source, target, exact, asked.repeats)
        first = first or cost
        scores_only = "scoring" in name
        table.add_row(
            name,
            f"{cost.forward * 1e3:.2f}",
            f"{100 * logits_bytes / bandwidth / cost.forward:.0f} %",
            "-" if scores_only else f"{cost.backward * 1e3:.2f}",
            "-" if scores_only else f"{200 * logits_bytes / bandwidth / cost.backward:.0f} %",
            "-" if scores_only else f"{(first.forward + first.backward) / (cost.forward + cost.backward):.2f}",
            f"{cost.moved / source.numel():.1f}",
            f"{cost.peak / 2**20:.1f}",
            f"{cost.peak / first.peak:.2f}",
            f"{cost.error:.1e}",
        )
    console.print(table)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
