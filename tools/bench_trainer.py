"""Trainer ranks alone, without Ray or engines: tokens a second of the scoring and the update pass at a layout.

torchrun --standalone --nproc-per-node 2 tools/bench_trainer.py run.toml trainer.tensor_parallel=2

The configuration gives model, layout and batch (`rollout.prompts_per_step` x `rollout.group_size` sequences of random
tokens, responses of half to all of `rollout.max_response_tokens`). `trainer.world_size` is torchrun's.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from stare_megatron import config as configuration
from stare_megatron.config import Config
from stare_megatron.data.packing import plan_updates
from stare_megatron.data.tokenizer import read_vocab_size
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan import estimate, hardware
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.lengths import Lengths
from stare_megatron.plan.timing import Machine
from stare_megatron.run import folder
from stare_megatron.run.forecast import allocated
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control, Group, Prompt, Score, Span, SpanKind, Status, Trajectory

_ROUNDS = 4  # the first one warms up and is left out


def random_groups(config: Config, seed: int) -> list[Group]:
    """Groups of random tokens with the lengths a run may see; the same on every rank."""
    rng = np.random.default_rng(seed)
    vocab = read_vocab_size(config.model.path)
    longest = config.rollout.max_response_tokens
    groups = []
    for g in range(config.rollout.prompts_per_step):
        ids = rng.integers(0, vocab, max(2, config.data.max_prompt_tokens // 2)).astype(np.int32)
        prompt = Prompt(f"random-{g}", "random", "", tuple(ids.tolist()), "")
        trajectories, scores = [], []
        for sample in range(config.rollout.group_size):
            count = int(rng.integers((longest + 1) // 2, longest + 1))
            response = Span(
                SpanKind.ACTION, rng.integers(0, vocab, count).astype(np.int32), np.zeros(count, np.float32)
            )
            spans = (Span(SpanKind.PROMPT, ids, np.zeros(0, np.float32)), response)
            trajectories.append(Trajectory(prompt.id, sample, spans, Status.COMPLETED, (0, 0), sample))
            scores.append(Score(float(sample % 2), bool(sample % 2), ""))
        groups.append(Group(prompt, tuple(trajectories), tuple(scores)))
    return groups


def make_rank(config: Config) -> TrainerRank:
    """The trainer rank that torchrun started this process for."""
    return TrainerRank(
        config,
        rank=int(os.environ["RANK"]),
        world_size=config.trainer.world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
    )


def load(trainer: TrainerRank, config: Config, number: int) -> int:
    """Give the rank its share of a random batch, the same for the same `number`; tokens in the whole batch."""
    groups = random_groups(config, number)
    cost = read_hf_config(config.model.path).sequence_cost
    plans = plan_updates([group.summary() for group in groups], config.trainer, cost)
    trainer.load([(groups, plan[trainer.position().data_parallel_rank]) for plan in plans])
    return sum(trajectory.num_tokens for group in groups for trajectory in group.trajectories)


def measure(config: Config) -> tuple[int, list[float], list[float], int]:
    """Tokens a round, seconds of each scoring and update pass, peak bytes of this rank."""
    trainer = make_rank(config)
    score_s, update_s, tokens = [], [], 0
    for number in range(_ROUNDS):
        tokens = load(trainer, config, number)
        began = time.perf_counter()
        entropy = trainer.score().entropy
        scored = time.perf_counter()
        trainer.update(Control(True, 1.1, 0.9, entropy, entropy + 1.0))
        score_s.append(scored - began)
        update_s.append(time.perf_counter() - scored)
    peak = trainer.peak_memory_bytes()
    trainer.close()
    return tokens, score_s[1:], update_s[1:], peak


def planned(config: Config) -> tuple[float, float, float] | None:
    """What the planner (docs/planning.md) says of such a batch on this GPU: tokens/s of both passes, bytes at the peak;
    None on a CPU, and on a GPU that it does not know."""
    seen = device.gpus()
    try:
        gpu = hardware.find(seen[0].name) if seen else None
    except UserError:
        gpu = None
    if gpu is None:
        return None
    trajectories = [t for group in random_groups(config, 1) for t in group.trajectories]
    responses = tuple(sorted(t.num_action_tokens for t in trajectories))
    prompt = trajectories[0].num_tokens - trajectories[0].num_action_tokens
    layers = Layers.ENGINE if device.has_transformer_engine() else Layers.LOCAL
    machine = Machine(gpu, hardware.CONSTANTS, layers)
    given = estimate.Given(machine, Lengths(prompt, responses, "random"))
    plan = estimate.make(config, read_hf_config(config.model.path), given, cures=False)
    tokens = sum(given.lengths.sequences)
    return tokens / plan.score.seconds, tokens / plan.update.seconds, allocated(plan)


def main(argv: list[str]) -> int:
    if "RANK" not in os.environ:
        print("bench_trainer: start it with torchrun (see its first lines)", file=sys.stderr)
        return 2
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ.update(device.trainer_environment())
    try:
        config = configuration.load(Path(argv[0]), [*argv[1:], f"trainer.world_size={world_size}"])
    except UserError as e:
        print(f"bench_trainer: {e}", file=sys.stderr)
        return 2
    tokens, score_s, update_s, peak = measure(config)
    if rank == 0:
        t = config.trainer
        table = Table(title=f"{config.model.path}, {tokens:,} tokens a round, median of {_ROUNDS - 1}")
        for heading in ("layout", "score tokens/s", "update tokens/s", "peak of rank 0, MB"):
            table.add_column(heading, justify="right")
        layout = f"TP{t.tensor_parallel} PP{t.pipeline_parallel} CP{t.context_parallel} DP{t.data_parallel}"
        score, update = (tokens / float(np.median(seconds)) for seconds in (score_s, update_s))
        table.add_row(layout, f"{score:,.0f}", f"{update:,.0f}", f"{peak / 2**20:,.0f}")
        if expected := planned(config):
            table.add_row("plan", *(f"{value:,.0f}" for value in expected[:2]), f"{expected[2] / 2**20:,.0f}")
        versions = ", ".join(f"{name} {version}" for name, version in folder.package_versions().items())
        Console().print(table, f"{folder.hardware()}; {versions}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
