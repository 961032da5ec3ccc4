"""Top-P% of tokens spread over ranks: ours against gathering everything, and against thresholds that are not exact.

python tools/bench_selection.py [--tokens 1000000] [--ranks 2] [--fraction 0.1] [--repeats 3]

Ranks are gloo processes of this machine. `payload`: bytes that a rank hands to collectives for one selection, counted.
`Jaccard`: overlap of the chosen tokens with those of a sort in one process; every form but ours may differ from it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from stare_megatron.algo.comm import Comm, GroupComm
from stare_megatron.algo.selection import NEGATIVE, POSITIVE, hash32, order_key, select_top, top_count
from stare_megatron.run.folder import hardware

Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, Comm], torch.Tensor]


class CountingShards:
    """A process group's shards that count the bytes of what this rank hands over."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._inner = GroupComm(group)
        self.payload = self.calls = 0

    def _count(self, x: torch.Tensor) -> torch.Tensor:
        self.payload += x.numel() * x.element_size()
        self.calls += 1
        return x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner.sum(self._count(x))

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return self._inner.max(self._count(x))

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return self._inner.gather(self._count(x))


def ours(
    value_T: torch.Tensor, subset_T: torch.Tensor, id_T: torch.Tensor, fraction: float, comm: Comm
) -> torch.Tensor:
    return select_top(value_T, subset_T, id_T, fraction, comm).selected_T


def gather_and_sort(
    value_T: torch.Tensor, subset_T: torch.Tensor, id_T: torch.Tensor, fraction: float, comm: Comm
) -> torch.Tensor:
    """Everything to every rank, then a sort by (value, hash): as exact as ours."""
    key_T = (order_key(value_T) << 32 | hash32(id_T)) ^ (-(2**63))  # unsigned order as int64
    every_key = torch.cat(comm.gather(key_T))
    every_subset = torch.cat(comm.gather(subset_T.to(torch.int8)))
    chosen_T = torch.zeros_like(subset_T, dtype=torch.bool)
    for code in (POSITIVE, NEGATIVE):
        keys = every_key[every_subset == code].sort(descending=True).values
        k = int(top_count(fraction, torch.tensor(keys.shape[0])))
        if k:
            chosen_T |= (subset_T == code) & (key_T >= keys[k - 1])
    return chosen_T


def mean_of_quantiles(
    value_T: torch.Tensor, subset_T: torch.Tensor, id_T: torch.Tensor, fraction: float, comm: Comm
) -> torch.Tensor:
    """One threshold for all ranks: the mean of each rank's own quantile. Approximate."""
    ranks = comm.sum(torch.ones(1))
    own = [_kth(value_T[subset_T == code], fraction) for code in (POSITIVE, NEGATIVE)]
    threshold_S = comm.sum(torch.stack(own)) / ranks
    return (subset_T <= NEGATIVE) & (value_T >= threshold_S[subset_T.clamp(max=NEGATIVE)])


def per_rank(
    value_T: torch.Tensor, subset_T: torch.Tensor, id_T: torch.Tensor, fraction: float, comm: Comm
) -> torch.Tensor:
    """Each rank by itself, as implementations without a collective do."""
    chosen_T = torch.zeros_like(subset_T, dtype=torch.bool)
    for code in (POSITIVE, NEGATIVE):
        chosen_T |= (subset_T == code) & (value_T >= _kth(value_T[subset_T == code], fraction))
    return chosen_T


def _kth(value_T: torch.Tensor, fraction: float) -> torch.Tensor:
    if not value_T.shape[0]:
        return torch.tensor(torch.inf)
    k = int(top_count(fraction, torch.tensor(value_T.shape[0])))
    return value_T.topk(k, sorted=True).values[-1]


FORMS: dict[str, Choose] = {
    "radix selection (ours)": ours,
    "all-gather and sort": gather_and_sort,
    "mean of ranks' quantiles": mean_of_quantiles,
    "each rank by itself": per_rank,
}


@dataclass(frozen=True)
class Result:
    """Of one form on one rank: seconds (median), bytes and calls of one selection, chosen global ids."""

    seconds: float
    payload: int
    calls: int
    chosen: torch.Tensor


def tokens(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Surprisals of confident and of unsure sequences of 512 tokens, and subsets by sequence; ids are positions."""
    g = torch.Generator().manual_seed(0)
    sequence_T = torch.arange(number) // 512
    sequences = int(sequence_T[-1]) + 1
    scale = torch.rand(sequences, generator=g) ** 2
    value_T = -torch.log(torch.rand(number, generator=g)) * scale[sequence_T]
    return value_T, torch.randint(0, 3, (sequences,), generator=g)[sequence_T]


def work(rank: int, ranks: int, rendezvous: str, number: int, fraction: float, repeats: int, folder: str) -> None:
    """A contiguous piece of the batch on this rank; results go to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    value, subset = tokens(number)
    mine = torch.arange(number).tensor_split(ranks)[rank]
    results = {}
    for name, choose in FORMS.items():
        times = []
        for _ in range(repeats + 1):
            group = dist.group.WORLD
            assert isinstance(group, dist.ProcessGroup)
            comm = CountingShards(group)
            dist.barrier()
            start = time.perf_counter()
            chosen = choose(value[mine], subset[mine], mine, fraction, comm)
            times.append(time.perf_counter() - start)
        results[name] = Result(statistics.median(times[1:]), comm.payload, comm.calls, mine[chosen])
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tokens", type=int, default=1_000_000)
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--fraction", type=float, default=0.1)
    options.add_argument("--repeats", type=int, default=3)
    asked = options.parse_args()
    asked.tokens -= asked.tokens % asked.ranks  # gathers want equal shapes
    with tempfile.TemporaryDirectory() as folder:
        arguments = (asked.ranks, f"{folder}/rendezvous", asked.tokens, asked.fraction, asked.repeats, folder)
        spawn(work, arguments, nprocs=asked.ranks)
        found = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(asked.ranks)]
    oracle = _oracle(asked.tokens, asked.fraction)
    console = Console(width=110)
    console.print(f"{hardware()}; torch {torch.__version__}, gloo, one thread a rank")
    console.print(f"{asked.tokens} tokens on {asked.ranks} ranks, P = {asked.fraction}, {len(oracle)} to choose")
    table = Table("form", "ms", "payload per rank, KB", "collectives", "Jaccard")
    for name in FORMS:
        parts: list[Result] = [of_rank[name] for of_rank in found]
        chosen = {int(i) for part in parts for i in part.chosen}
        table.add_row(
            name,
            f"{max(part.seconds for part in parts) * 1e3:.1f}",
            f"{max(part.payload for part in parts) / 1e3:.1f}",
            str(parts[0].calls),
            f"{len(chosen & oracle) / len(chosen | oracle):.4f}",
        )
    console.print(table)


def _oracle(number: int, fraction: float) -> set[int]:
    """Global ids by a stable sort by value then hash, in one process."""
    value, subset = tokens(number)
    ids = torch.arange(number)
    chosen: set[int] = set()
    for code in (POSITIVE, NEGATIVE):
        own = ids[subset == code]
        own = own[hash32(own).argsort(descending=True)]
        own = own[value[own].argsort(descending=True, stable=True)]
        chosen |= set(own[: int(top_count(fraction, torch.tensor(own.shape[0])))].tolist())
    return chosen


if __name__ == "__main__":
    main()
