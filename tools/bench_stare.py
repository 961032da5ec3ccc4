"""What STARE adds to a step of GRPO on CPUs: time, collectives and bytes of what its rules do with a batch's tokens.

torchrun --standalone --nproc-per-node 1 tools/bench_stare.py run.toml

Model, layout and batch are the configuration's, as in `bench_trainer`. A step of GRPO is a scoring and an update pass.
The rules are then run on as many tokens a rank, with surprisals and sensitivities of random logits; so the difference
is measured by itself, and not between two long times. Not counted: the factor of each token's loss, one multiplication.
Times are CPU time of rank 0, all threads. Payload: bytes that a rank hands to all-reduces.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stare_megatron import config as configuration  # noqa: E402
from stare_megatron.algo import dynamics  # noqa: E402
from stare_megatron.algo.comm import Comm, OneRank  # noqa: E402
from stare_megatron.algo.registry import ALGORITHMS  # noqa: E402
from stare_megatron.algo.stare import ScoredCandidates  # noqa: E402
from stare_megatron.config import AlgorithmConfig, Config  # noqa: E402
from stare_megatron.errors import UserError  # noqa: E402
from stare_megatron.host import device  # noqa: E402
from stare_megatron.run import folder  # noqa: E402
from stare_megatron.types import Control  # noqa: E402
from tools.bench_selection import CountingShards  # noqa: E402
from tools.bench_trainer import load, make_rank  # noqa: E402

REPEATS, STEPS = 21, 3
_WORDS = 64  # of the vocabulary that a token's sensitivity is made of
SHUT, OPEN = Control(False, 1.0, 1.0, 0.4, 0.3), Control(True, 1.1, 0.9, 0.2, 0.3)


def candidates(count: int, rank: int) -> ScoredCandidates:
    """`count` action tokens of this rank, half of them with a positive advantage."""
    made = torch.Generator().manual_seed(rank)
    log_p_TV = (3.0 * torch.randn(count, _WORDS, generator=made)).log_softmax(1)
    p_TV = log_p_TV.exp()
    entropy_T = -(p_TV * log_p_TV).sum(1)
    drawn_T = torch.multinomial(p_TV, 1, generator=made)[:, 0]
    spread_TV = -p_TV * (log_p_TV + entropy_T[:, None])  # of the entropy by the logits
    own_T = spread_TV.gather(1, drawn_T[:, None])[:, 0]
    return ScoredCandidates(
        surprisal_T=-log_p_TV.gather(1, drawn_T[:, None])[:, 0],
        advantage_T=torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0),
        action_T=torch.ones(count, dtype=torch.bool),
        global_id_T=torch.arange(count) + rank * count,
        entropy_T=entropy_T,
        sensitivity_T=(p_TV * spread_TV).sum(1) - own_T,
    )


@dataclass(frozen=True)
class Rule:
    """What `trainer.step` does of a method with the tokens of a batch before and after its update pass."""

    title: str
    config: AlgorithmConfig
    control: Control

    def run(self, tokens: ScoredCandidates, comm: Comm) -> None:
        algorithm = ALGORITHMS[self.config.method]
        if algorithm.foresees(self.config):
            chosen_T = algorithm.weigh(tokens, self.control, self.config, comm).selection.selected_T
            dynamics.forces(dynamics.measure_forces(tokens, chosen_T, comm).tolist())
            algorithm.weigh(tokens, self.control, self.config, comm)
            return
        algorithm.weigh(tokens, self.control, self.config, comm)
        dynamics.exact_set(tokens, self.config.stare.fraction, comm)  # for a metric that every method has


def rules() -> list[Rule]:
    grpo, fixed = AlgorithmConfig(method="grpo"), AlgorithmConfig(method="stare")
    auto = AlgorithmConfig.model_validate({"method": "stare", "stare": {"weight": "auto"}})
    return [
        Rule("GRPO", grpo, SHUT),
        Rule("STARE, gate shut", fixed, SHUT),
        Rule("STARE, gate open", fixed, OPEN),
        Rule("STARE auto", auto, OPEN),
    ]


def step(config: Config) -> tuple[int, float]:
    """Tokens of a step of GRPO and its seconds, median of some after one that warms up."""
    trainer = make_rank(config)
    times, tokens = [], 0
    for number in range(STEPS + 1):
        tokens = load(trainer, config, number)
        began = time.process_time()
        trainer.score()
        trainer.update(SHUT)
        times.append(time.process_time() - began)
    trainer.close()
    return tokens, statistics.median(times[1:])


def seconds(run: Callable[[], None]) -> float:
    """Median of some runs, after one that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def main(argv: list[str]) -> int:
    if "RANK" not in os.environ:
        print("bench_stare: start it with torchrun (see its first lines)", file=sys.stderr)
        return 2
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update(device.trainer_environment())
    try:
        settings = [*argv[1:], f"trainer.world_size={world_size}", "algorithm.method=grpo"]
        config = configuration.load(Path(argv[0]), settings)
    except UserError as e:
        print(f"bench_stare: {e}", file=sys.stderr)
        return 2
    batch, whole = step(config)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("no process group")
    tokens = candidates(batch // world_size, rank)
    table = Table(
        title=f"{config.model.path}: {batch:,} tokens a step on {world_size} ranks, GRPO {whole:.3f} s a step"
    )
    for heading in ("rule", "ms a step", "more than GRPO, ms", "of its step", "all-reduces", "payload, bytes"):
        table.add_column(heading, justify="right")
    least = 0.0
    for rule in rules():
        counted = CountingShards(group)
        rule.run(tokens, counted)
        shards: Comm = CountingShards(group) if world_size > 1 else OneRank()
        took = seconds(lambda rule=rule, shards=shards: rule.run(tokens, shards))
        least = least or took
        more = took - least
        times = f"{1e3 * took:.2f}", f"{1e3 * more:+.2f}", f"{more / whole:+.4%}"
        table.add_row(rule.title, *times, f"{counted.calls}", f"{counted.payload:,}")
    if rank == 0:
        Console().print(table, folder.hardware(), soft_wrap=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
