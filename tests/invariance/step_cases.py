"""What the step tests run on ranks: a fixed random model, a fixed batch with tool output, and probes of a TrainerRank.

Functions named in `launch("step_cases:...")` take a `Rank` first.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from launch import Rank, free_port

from stare_megatron.config import AlgorithmConfig, Config, TrainerConfig, parse
from stare_megatron.data.packing import plan_updates
from stare_megatron.errors import RunError
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import (
    QUADRANTS,
    Assignment,
    Control,
    EntropyReading,
    Group,
    Prompt,
    Score,
    SequenceCost,
    Span,
    SpanKind,
    Status,
    Trajectory,
    UpdateShare,
    UpdateStats,
)

VOCAB = 112
PROBE = np.arange(3, 20, dtype=np.int32)
COST = SequenceCost(1.0, 0.02)  # half is attention at 50 tokens
Overrides = dict[str, dict[str, Any]]


def make_checkpoint(folder: Path, *, layers: int = 4, seed: int = 0) -> Path:
    """A random tied Qwen2 with weights large enough that tokens differ in surprisal."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        initializer_range=0.08,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def quadrants(stats: UpdateStats, kind: str) -> list[float]:
    """Sums over the tokens of each quadrant: `tokens`, `advantage` or predicted `change`."""
    return [stats.part(f"dynamics/{kind}_{q}").total for q in QUADRANTS]


def make_groups(*, groups: int = 6, size: int = 4, seed: int = 1) -> list[Group]:
    """Mixed lengths; every second trajectory has a tool-output hole; one trajectory failed, one is empty."""
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        prompt = Prompt(f"p{g}", "test", "", tuple(int(t) for t in rng.integers(3, VOCAB, rng.integers(2, 9))), "")
        trajectories, scores = [], []
        for s in range(size):
            spans = [Span(SpanKind.PROMPT, np.array(prompt.token_ids, np.int32), np.empty(0, np.float32))]
            for turn in range(1 + s % 2):
                if turn:
                    hole = rng.integers(3, VOCAB, rng.integers(1, 6)).astype(np.int32)
                    spans.append(Span(SpanKind.OBSERVATION, hole, np.empty(0, np.float32)))
                n = 0 if (g, s) == (1, 2) else int(rng.integers(1, 20))
                tokens = rng.integers(3, VOCAB, n).astype(np.int32)
                spans.append(Span(SpanKind.ACTION, tokens, (-4.7 + 0.3 * rng.standard_normal(n)).astype(np.float32)))
            status = Status.FAILED if (g, s) == (2, 1) else Status.COMPLETED
            trajectories.append(Trajectory(prompt.id, s, tuple(spans), status, (0, 0), s))
            scores.append(Score(float(rng.integers(0, 2)) if g else float(rng.normal()), False, ""))
        made.append(Group(prompt, tuple(trajectories), tuple(scores)))
    return made


def in_order(groups: list[Group], seed: int) -> list[Group]:
    """The same groups and trajectories in another order."""
    rng = np.random.default_rng(seed)
    shuffled = []
    for g in rng.permutation(len(groups)):
        samples = rng.permutation(len(groups[g].trajectories))
        trajectories, scores = (
            tuple(column[s] for s in samples) for column in (groups[g].trajectories, groups[g].scores)
        )
        shuffled.append(Group(groups[g].prompt, trajectories, scores))
    return shuffled


def make_config(checkpoint: Path, overrides: Overrides) -> Config:
    """A run on `checkpoint`; `overrides` by top-level table."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"steps": 10},
        "model": {"path": str(checkpoint), "dtype": "float32"},
        "data": {"train": ["none.jsonl"], "max_prompt_tokens": 32},
        "reward": {"name": "exact"},
        "rollout": {"prompts_per_step": 6, "group_size": 4, "max_response_tokens": 128},
        "algorithm": {"method": "stare", "stare": {"variant": "C2", "fraction": 0.1, "target_entropy": 9.0}},
        "trainer": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}},
    }
    for table, values in overrides.items():
        tree[table] = tree.get(table, {}) | values
    return parse(tree, "test")


def start(rank: Rank, config: Config) -> TrainerRank:
    return TrainerRank(config, **dataclasses.asdict(rank))


def save(trainer: TrainerRank, folder: Path, step: int) -> None:
    trainer.begin_save(folder, step)
    trainer.finish_save()


def first_tokens(groups: list[Group]) -> dict[tuple[str, int], int]:
    """Global id of each trajectory's first token, by prompt and sample, when `groups` come in this order."""
    (plan,) = plan_updates([g.summary() for g in groups], TrainerConfig(), COST)
    return {
        (groups[a.group].prompt.id, groups[a.group].trajectories[s].sample): first
        for a in plan[0].assignments
        for s, first in zip(a.samples, a.first_token, strict=True)
    }


def load(
    trainer: TrainerRank, config: Config, groups: list[Group], ids: dict[tuple[str, int], int] | None = None
) -> None:
    """What the driver does: plan, and hand each rank its share. `ids`: first tokens, if not those of this order."""
    plans = plan_updates([g.summary() for g in groups], config.trainer, COST)
    shares: list[UpdateShare] = [plan[trainer.position().data_parallel_rank] for plan in plans]
    if ids is not None:
        shares = [
            dataclasses.replace(s, assignments=tuple(_with_ids(a, groups, ids) for a in s.assignments)) for s in shares
        ]
    trainer.load([(groups, share) for share in shares])


def _with_ids(assignment: Assignment, groups: list[Group], ids: dict[tuple[str, int], int]) -> Assignment:
    group = groups[assignment.group]
    keys = [(group.prompt.id, group.trajectories[s].sample) for s in assignment.samples]
    return dataclasses.replace(assignment, first_token=tuple(ids[key] for key in keys))


def gradient(trainer: TrainerRank) -> dict[str, Any]:
    """Every parameter's gradient, whole, by Hugging Face name, float32; a collective. Between the backward pass and the
    optimizer, which clips it in place."""
    import torch
    import torch.distributed as dist
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    from stare_megatron.trainer import parallel
    from stare_megatron.trainer.bridge import export

    group = parallel.dp_cp_group()
    size = dist.get_world_size(group)
    if size > 1 and trainer._config.trainer.distributed_optimizer:  # each rank has reduced its part only
        for buffer in (b for chunk in trainer._chunks for b in chunk.buffers):
            for bucket in buffer.buckets:
                own = shard_buffer(bucket.grad_data, size)[dist.get_rank(group)].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
    # In the parameters' place, not in their data: another dtype there would cost them upstream's backward hooks.
    modules = [module for chunk in trainer._chunks for module in chunk.modules()]
    owners = [(module, name, p) for module in modules for name, p in module._parameters.items() if p is not None]
    try:
        for module, name, p in owners:
            module._parameters[name] = torch.nn.Parameter(p.main_grad, requires_grad=False)
        return {name: tensor.to("cpu", copy=True) for name, tensor in export(trainer._chunks, torch.float32)}
    finally:
        for module, name, p in owners:
            module._parameters[name] = p


def keep_gradients(trainer: TrainerRank) -> list[dict[str, Any]]:
    """A list that every optimizer step to come adds its gradient to."""
    kept, take_step = [], trainer._optimizer_step

    def tapped(*arguments: Any) -> UpdateStats:
        kept.append(gradient(trainer))
        return take_step(*arguments)

    trainer._optimizer_step = tapped  # type: ignore[method-assign]
    return kept


def selected_ids(trainer: TrainerRank, config: Config, control: Control) -> list[int]:
    """Global ids of the tokens of L+ and L- on this rank (last stage), by the same call `update` makes."""
    from stare_megatron.trainer.ages import ages
    from stare_megatron.trainer.step import weigh

    if not trainer._runner.is_last_stage:
        return []
    data, known = trainer._loaded, trainer._known
    assert known is not None
    weights = weigh(
        trainer._runner, data, known.tokens(), control, trainer._algorithm, config.algorithm, ages(data, 0, 0)
    )
    return [
        int(i) for d, w in zip(data, weights, strict=True) for i in d.batch.global_id_T[w.selection.selected_T].tolist()
    ]


def steps(rank: Rank, config: Config, *, count: int = 2, order: int | None = None) -> dict[str, Any]:
    """`count` batches of load, score, update; what a run would see of them, and the first gradient on rank 0.

    `order`: seed of another order of the sequences; they keep their global ids.
    """
    trainer = start(rank, config)
    gradients = keep_gradients(trainer)
    seen: dict[str, Any] = {"readings": [], "scores": [], "stats": [], "selected": []}
    for i in range(count):
        groups = make_groups(seed=1 + i)
        if order is None:
            load(trainer, config, groups)
        else:
            load(trainer, config, in_order(groups, order), first_tokens(groups))
        reading = trainer.score()
        control = Control(reading.entropy < 9.0, 1.5, 0.5, reading.entropy, 9.0)
        seen["selected"].append(selected_ids(trainer, config, control))
        done = trainer.update(control)
        seen["readings"].append(reading)
        seen["scores"].append(done.scores)
        seen["stats"].extend(done.updates)
    seen["probe"] = trainer.score_tokens(PROBE)
    seen["position"] = trainer.position()
    seen["gradient"] = gradients[0] if rank.rank == 0 and gradients else {}
    trainer.close()
    return seen


def decisions(target: float, entropies: list[float]) -> list[tuple[Any, ...]]:
    """State, gate, W and M of the adaptive controller after each step."""
    from stare_megatron.algo import controller

    settings = {"variant": "C2", "target_entropy": target, "adaptive": True}
    config = AlgorithmConfig.model_validate({"method": "stare", "stare": settings})
    state, found = controller.initial(config), []
    for entropy in entropies:
        state, control = controller.observe(config, state, EntropyReading(1, entropy))
        found.append((state, control.gate_on, control.weight_pos, control.weight_neg))
    return found


class Ports:
    """A fresh port for each process group that the ranks form one after the other: one chosen beforehand may be taken
    by the time it is used."""

    def __init__(self, rank: Rank) -> None:
        import torch.distributed as dist

        self._rank = rank
        self._store = dist.TCPStore(rank.master_addr, rank.master_port, rank.world_size, rank.rank == 0)
        self._used = 0

    def next(self) -> Rank:
        """This rank with a new port."""
        self._used += 1
        key = f"port{self._used}"
        if self._rank.rank == 0:
            self._store.set(key, str(free_port()))
        return dataclasses.replace(self._rank, master_port=int(self._store.get(key)))


def many(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides]) -> dict[str, dict[str, Any]]:
    """`steps` of each case, one after the other in the same processes. A table `batch` holds arguments of `steps`."""
    ports = Ports(rank)
    found = {}
    for name, overrides in cases.items():
        tables = {table: values for table, values in overrides.items() if table != "batch"}
        found[name] = steps(ports.next(), make_config(checkpoint, tables), **overrides.get("batch", {}))
    return found


def resume(
    rank: Rank, *, checkpoint: Path, folder: Path, layouts: dict[str, tuple[Overrides, Overrides]]
) -> dict[str, dict[str, Any]]:
    """For each pair: a step, a save and an export under the first layout, then the same next step under it and,
    restored, under the second."""
    ports = Ports(rank)
    found = {}
    for name, (first, second) in layouts.items():
        config = make_config(checkpoint, first)
        trainer = start(ports.next(), config)
        _step(trainer, config, 1)
        save(trainer, folder / name / "trainer", 7)
        trainer.export_hf(folder / name / "hf")
        seen: dict[str, Any] = {"probe": trainer.score_tokens(PROBE), "went_on": _step(trainer, config, 2)}
        trainer.close()
        config = make_config(checkpoint, second)
        trainer = start(ports.next(), config)
        seen["step"] = trainer.restore(folder / name / "trainer")
        seen["restored_probe"] = trainer.score_tokens(PROBE)
        seen["resumed"] = _step(trainer, config, 2)
        trainer.close()
        found[name] = seen
    return found


def _step(trainer: TrainerRank, config: Config, seed: int) -> tuple[UpdateStats, ...]:
    load(trainer, config, make_groups(seed=seed))
    entropy = trainer.score().entropy
    return trainer.update(Control(True, 1.5, 0.5, entropy, 9.0)).updates


def failures(rank: Rank, *, checkpoint: Path) -> list[str]:
    """What is said of a batch whose engine log-prob is not finite, and of weights that are not."""
    import torch

    said = []
    config = make_config(checkpoint, {})
    trainer = start(rank, config)
    groups = make_groups()
    groups[0].trajectories[0].spans[1].logprobs[0] = -np.inf
    load(trainer, config, groups)
    try:
        trainer.score()
    except RunError as e:
        said.append(str(e))
    load(trainer, config, make_groups())
    entropy = trainer.score().entropy
    before = trainer.score_tokens(PROBE)
    with torch.no_grad():
        trainer._known.scored[0].scores.logprob_T.fill_(torch.nan)
    try:
        trainer.update(Control(True, 1.5, 0.5, entropy, 9.0))
    except RunError as e:
        said.append(str(e))
    assert np.array_equal(trainer.score_tokens(PROBE), before)
    assert trainer.peak_memory_bytes() > 50 << 20
    trainer.close()
    return said


def transformers_step(checkpoint: Path) -> dict[str, Any]:
    """The first step of `steps` by the equations alone: no packing, no collective, nothing of the package but types."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logprobs, entropies, advantages, gaps = [], [], [], []
    for group in make_groups():
        played = [
            (t, s) for t, s in zip(group.trajectories, group.scores, strict=True) if t.status is not Status.FAILED
        ]
        rewards = torch.tensor([score.reward for _, score in played], dtype=torch.float64)
        spread = rewards.std() + 1e-6
        for (trajectory, _), reward in zip(played, rewards, strict=True):
            action = torch.from_numpy(trajectory.action_mask())
            if not action.any():
                continue
            ids = torch.from_numpy(trajectory.token_ids()).long()
            logp = torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)[action[1:]]
            chosen = logp.gather(1, ids[1:][action[1:], None])[:, 0]
            logprobs.append(chosen)
            entropies.append(-(logp.exp() * logp).sum(1).detach())
            advantages.append(torch.full_like(chosen, float((reward - rewards.mean()) / spread)).detach())
            engine = torch.from_numpy(trajectory.rollout_logprobs()).double()[action]
            gaps.append((chosen.detach() - engine).abs())
    logprob, advantage = torch.cat(logprobs), torch.cat(advantages)
    weight, selected = torch.ones_like(advantage), []
    for subset, value in ((advantage > 0, 1.5), (advantage < 0, 0.5)):
        k = -(-int(subset.sum()) // 10)
        weight[torch.where(subset, -logprob.detach(), -torch.inf).topk(k).indices] = value
        selected.append(k)
    ratio = torch.exp(logprob - logprob.detach())
    loss = (-weight * advantage * ratio).sum() / len(logprob)
    loss.backward()
    return {
        "tokens": len(logprob),
        "entropy": float(torch.cat(entropies).mean()),
        "surprisal": float(-logprob.detach().mean()),
        "mismatch": float(torch.cat(gaps).mean()),
        "selected": tuple(selected),
        "loss": float(loss.detach()),
        "grad_norm": float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()),
    }
