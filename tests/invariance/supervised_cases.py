"""What the tests of supervised training run on ranks, and what transformers makes of the same sequences."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import step_cases
from launch import Rank

from stare_megatron.config import Config, parse_sft
from stare_megatron.data.packing import plan_updates
from stare_megatron.data.supervised import BatchStream, Counts, SequenceSet
from stare_megatron.trainer.supervised import SupervisedRank
from stare_megatron.types import Measured

STEPS = 5
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip_grad": 0.5}


def sequences(count: int = 24, seed: int = 3) -> SequenceSet:
    """Mixed lengths; most have a hole that is not learned, some end in one."""
    rng = np.random.default_rng(seed)
    tokens, marks = [], []
    for n in range(count):
        lengths = [int(rng.integers(1, 9)), int(rng.integers(1, 14)), *(int(rng.integers(1, 6)) for _ in range(n % 3))]
        tokens.append(rng.integers(3, step_cases.VOCAB, sum(lengths)).astype(np.int32))
        marks.append(np.repeat([k % 2 == 1 for k in range(len(lengths))], lengths))
    ends = np.cumsum([len(t) for t in tokens], dtype=np.int64)
    return SequenceSet(np.concatenate(tokens), np.concatenate(marks), ends, Counts(count, 0, 0, 0), "")


def make_config(path: Path, trainer: dict[str, Any]) -> tuple[Config, BatchStream]:
    """Settings of the ranks, and the batches of two epochs."""
    tree = {
        "model": {"path": str(path), "dtype": "float32"},
        "data": {"train": ["none.jsonl"]},
        "sft": {"epochs": 2, "batch_sequences": 9, "max_tokens": 64},
        "trainer": {"micro_batch_tokens": 48, "optimizer": OPTIMIZER} | trainer,
    }
    config = parse_sft(tree, "test")
    stream = BatchStream(sequences(), config)
    return config.lasting(stream.remaining()).for_ranks(), stream


def load(trainer: SupervisedRank, config: Config, chosen: list[int]) -> None:
    """What the driver does: plan, and hand each rank its share."""
    groups = [sequences().group(i) for i in chosen]
    (plan,) = plan_updates([group.summary() for group in groups], config.trainer, step_cases.COST)
    trainer.load([(groups, plan[trainer.position().data_parallel_rank])])


@dataclasses.dataclass(frozen=True)
class Learned:
    """`stats`: by step, by name; `gradients`: of each step, `weights`: at the end, by Hugging Face name, on rank 0;
    `held_out`: of the sequences of the first batch, after every step."""

    stats: list[dict[str, float]]
    gradients: list[dict[str, Any]]
    weights: dict[str, Any]
    held_out: list[Measured]


def learn(
    rank: Rank, *, path: str, layouts: list[tuple[int, dict[str, Any]]], save: str = "", resume: str = ""
) -> list[Learned]:
    """Each layout with its port, one after another in this process. `save`: after the third step, to this folder;
    `resume`: from there."""
    return [
        _learn(dataclasses.replace(rank, master_port=port), Path(path), layout, save, resume)
        for port, layout in layouts
    ]


def _learn(rank: Rank, path: Path, layout: dict[str, Any], save: str, resume: str) -> Learned:
    config, stream = make_config(path, layout | {"world_size": rank.world_size})
    trainer = SupervisedRank(config, **dataclasses.asdict(rank))
    gradients: list[dict[str, Any]] = []
    apply = trainer._apply

    def tapped(*arguments: Any) -> list[Measured]:
        gradients.append(step_cases.gradient(trainer))
        return apply(*arguments)

    trainer._apply = tapped  # type: ignore[method-assign]
    done = trainer.restore(Path(resume)) if resume else 0
    stats, held_out = [], []
    for step in range(1, STEPS + 1):
        chosen = stream.take()
        if step <= done:
            continue
        load(trainer, config, chosen)
        stats.append({part.name: part.value for part in trainer.fit().measured})
        load(trainer, config, list(range(9)))
        held_out.append(trainer.held_out())
        if save and step == 3:
            step_cases.save(trainer, Path(save), step)
    weights = {name: tensor.clone() for name, tensor in trainer.weights()}
    trainer.close()
    own = rank.rank == 0
    return Learned(stats, gradients if own else [], weights if own else {}, held_out)


def reference(path: Path) -> Learned:
    """The same steps by transformers and torch's AdamW, sequence by sequence."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    named = dict(model.named_parameters())
    free = [p for name, p in named.items() if name.endswith("bias") or "norm" in name]
    decayed = [p for p in named.values() if all(p is not q for q in free)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": free, "weight_decay": 0.0}],
        lr=OPTIMIZER["lr"],
        betas=(OPTIMIZER["beta1"], OPTIMIZER["beta2"]),
        eps=OPTIMIZER["eps"],
    )
    data, (_, stream) = sequences(), make_config(path, {})
    stats, gradients, held_out = [], [], []
    for _ in range(STEPS):
        loss = _mean_loss(model, data, stream.take())[0]
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["clip_grad"])
        optimizer.step()
        stats.append({"update/loss": loss.item(), "update/grad_norm": norm.item()})
        with torch.no_grad():
            mean, tokens = _mean_loss(model, data, list(range(9)))
        held_out.append(Measured("sft/held_out_loss", mean.item() * tokens, tokens))
    return Learned(stats, gradients, {name: p.detach() for name, p in named.items()}, held_out)


def _mean_loss(model: Any, data: SequenceSet, chosen: list[int]) -> tuple[Any, int]:
    """transformers' own loss, which is a mean over a sequence's labels, as a mean over those of all."""
    import torch

    total, tokens = torch.zeros(()), 0
    for i in chosen:
        ids = torch.from_numpy(data.tokens[data.place(i)]).long()
        marks = torch.from_numpy(data.learn[data.place(i)])
        labels = torch.where(marks, ids, -100)
        total = total + model(input_ids=ids[None], labels=labels[None]).loss * int(marks.sum())
        tokens += int(marks.sum())
    return total / tokens, tokens
