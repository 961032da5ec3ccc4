"""Whether a converted checkpoint is the one it was made from: every tensor, or what the two models compute."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import xxhash

from stare_megatron.convert.mapping import McoreAsHf
from stare_megatron.convert.source import Kind, resolve
from stare_megatron.convert.tasks import blocks
from stare_megatron.convert.torch_dist import TorchDist
from stare_megatron.errors import RunError
from stare_megatron.models.entries import hf_names
from stare_megatron.models.shape import ModelShape
from stare_megatron.models.shards import Checkpoint

# Largest difference of logits that counts as the same function, in units of the largest logit (at least 1): float32
# arithmetic in another order.
LOGITS_TOLERANCE = 1e-5
# Two models in float32 and the process around them.
_LOGITS_BYTES_A_PARAMETER, _PROCESS_BYTES = 8.5, 1 << 30


@dataclass(frozen=True)
class Compared:
    """`tensors`: how many are equal bit for bit; `checksum`: XXH3 of their names and bytes, in order."""

    tensors: int
    checksum: str


@dataclass(frozen=True)
class Logits:
    """`difference`: largest, between Megatron-Core's and transformers' logits in float32; `largest`: of the logits;
    `tokens`: compared."""

    difference: float
    largest: float
    tokens: int

    @property
    def same(self) -> bool:
        return self.difference <= LOGITS_TOLERANCE * max(1.0, self.largest)


def logits_fit(parameters: int) -> bool:
    """Whether this machine has the memory for both models in float32 now."""
    return parameters * _LOGITS_BYTES_A_PARAMETER + _PROCESS_BYTES < psutil.virtual_memory().available


def compare_tensors(
    hf: Path, mcore: Path, shape: ModelShape, dtype: torch.dtype, progress: Callable[[int], object]
) -> Compared:
    """Read both checkpoints through the bridge and compare every tensor in `dtype`, a block of rows at a time.

    Raises:
        UserError: one of them is damaged.
        RunError: a tensor differs.
    """
    ours, theirs = McoreAsHf(TorchDist(mcore), shape), Checkpoint(hf)
    digest = xxhash.xxh3_128()
    names = hf_names(shape)
    for name, want in names.items():
        digest.update(name.encode())
        for first, last in blocks(want, dtype.itemsize):
            a = ours.read(name, first, last, dtype).view(torch.uint8)
            b = theirs.read(name, want, slice(first, last)).to(dtype).contiguous().view(torch.uint8)
            if not torch.equal(a, b):
                raise RunError(
                    f"{hf} and {mcore}: {name!r} differs in rows {first} to {last - 1}; a bug, or a bad disk"
                )
            digest.update(a.numpy().data.cast("B"))
            progress(a.nbytes)
            theirs.release()
    return Compared(len(names), digest.hexdigest())


def compare_logits(hf: Path, mcore: Path) -> Logits:
    """Load `mcore` into Megatron-Core and `hf` into transformers, in a process of their own, and compare what they make
    of the same random tokens."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_logits, hf, mcore).result()


def _logits(hf: Path, mcore: Path) -> Logits:
    from transformers import AutoModelForCausalLM

    from stare_megatron.host.ports import free_port
    from stare_megatron.models.families import read_hf_config
    from stare_megatron.trainer.logits import megatron_logits

    vocab = read_hf_config(hf).vocab
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, vocab, (n,), generator=generator) for n in (48, 1, 15)]
    ours = megatron_logits(hf, mcore, sequences, port=free_port())
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = torch.cat([model(ids[None]).logits[0] for ids in sequences])
    return Logits((ours - theirs).abs().max().item(), theirs.abs().max().item(), len(theirs))


def sides(source: Path, out: Path, hf: Path | None) -> tuple[Path, Path]:
    """The Hugging Face and the Megatron-Core folder of a conversion."""
    one, other = resolve(source, hf), resolve(out)
    return (one.weights, other.weights) if one.kind is Kind.HF else (other.weights, one.weights)
