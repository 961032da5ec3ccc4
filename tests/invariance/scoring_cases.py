"""What the tests of scoring modes run on ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from launch import Rank
from step_cases import (
    PROBE,
    Overrides,
    Ports,
    first_tokens,
    keep_gradients,
    load,
    make_config,
    make_groups,
    selected_ids,
    start,
)

from stare_megatron.config import Config
from stare_megatron.errors import RunError
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control, Group, SpanKind

ROLLOUT = {"scoring": "rollout"}


def both_ways(
    rank: Rank, *, checkpoint: Path, cases: dict[str, tuple[bool, Overrides]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Of each case (whether the engine agrees with the trainer to the bit, settings): a step with a scoring pass and
    one without, from the same weights and on the same batch. On one rank."""
    ports = Ports(rank)
    found = {}
    for name, (agreeing, overrides) in cases.items():
        config = make_config(checkpoint, overrides)
        groups = make_groups()
        if agreeing:
            trainer = start(ports.next(), config)
            groups = as_scored(trainer, config, groups)
            trainer.close()
        found[name] = {}
        for scoring in ("trainer", "rollout"):
            tables = overrides | {"trainer": overrides.get("trainer", {}) | {"scoring": scoring}}
            found[name][scoring] = _step(ports.next(), make_config(checkpoint, tables), groups)
    return found


def _step(rank: Rank, config: Config, groups: list[Group]) -> dict[str, Any]:
    trainer = start(rank, config)
    gradients = keep_gradients(trainer)
    load(trainer, config, groups)
    reading = trainer.score()
    control = Control(True, 1.5, 0.5, reading.entropy, 9.0)
    batch_scope = config.algorithm.stare.scope == "batch"
    seen = {"reading": reading, "selected": selected_ids(trainer, config, control) if batch_scope else []}
    done = trainer.update(control)
    seen |= {"scores": done.scores, "stats": done.updates[0], "gradient": gradients[0]}
    trainer.close()
    return seen


def as_scored(trainer: TrainerRank, config: Config, groups: list[Group]) -> list[Group]:
    """The groups as if the engine's log-probs were the trainer's, to the bit."""
    load(trainer, config, groups)
    trainer.score()
    known, (data,) = trainer._known, trainer._loaded
    ids, logprobs = data.batch.global_id_T.numpy(), known.scored[0].scores.logprob_T.numpy()
    by_id = np.zeros(ids.max() + 1, np.float32)
    by_id[ids] = logprobs
    firsts = first_tokens(groups)
    return [
        dataclasses.replace(g, trajectories=tuple(_with_logprobs(t, firsts, by_id) for t in g.trajectories))
        for g in groups
    ]


def _with_logprobs(trajectory: Any, firsts: dict[tuple[str, int], int], by_id: np.ndarray) -> Any:
    here = firsts.get((trajectory.prompt_id, trajectory.sample))
    if here is None:  # carries no loss
        return trajectory
    spans = []
    for span in trajectory.spans:
        count = len(span.token_ids)
        own = by_id[here : here + count].copy() if span.kind is SpanKind.ACTION else span.logprobs
        spans.append(dataclasses.replace(span, logprobs=own))
        here += count
    return dataclasses.replace(trajectory, spans=tuple(spans))


def failures(rank: Rank, *, checkpoint: Path) -> list[str]:
    """What is said of an engine's log-prob that is not finite, and of weights that are not; and whether the weights
    stayed as they were."""
    import torch

    said = []
    config = make_config(checkpoint, {"trainer": ROLLOUT})
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
    before = [p.detach().clone() for chunk in trainer._chunks for p in chunk.parameters()]
    head = trainer._runner.head.model.output_weight()
    with torch.no_grad():
        kept = head[5, 0].item()
        head[5, 0] = torch.nan
    try:
        trainer.update(Control(True, 1.5, 0.5, entropy, 9.0))
    except RunError as e:
        said.append(str(e))
    with torch.no_grad():
        head[5, 0] = kept
    after = [p for chunk in trainer._chunks for p in chunk.parameters()]
    said.append(str(all(torch.equal(a, b) for a, b in zip(after, before, strict=True))))
    said.append(str(bool(np.isfinite(trainer.score_tokens(PROBE)).all())))
    trainer.close()
    return said
