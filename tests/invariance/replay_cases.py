"""What the tests of routing replay run on ranks: batches whose trajectories bring experts. See `launch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from launch import Rank
from step_cases import Ports, keep_gradients, load, make_config, make_groups, start

from stare_megatron.errors import RunError
from stare_megatron.trainer.rank import TrainerRank
from stare_megatron.types import Control, Group, Prompt, Score, Span, SpanKind, Status, Trajectory

LAYERS, EXPERTS, TOP_K = 4, 4, 2
Experts = npt.NDArray[np.uint8]
REPLAY = {"inference": {"routing_replay": True}}


def random_experts(trajectory: Trajectory) -> Experts:
    """Other experts for each token and layer, the same in every process; none for the last token."""
    seed = [*trajectory.token_ids().tolist(), trajectory.sample]
    order = np.random.default_rng(seed).random((trajectory.num_tokens - 1, LAYERS, EXPERTS)).argsort(-1)
    return order[..., :TOP_K].astype(np.uint8)


def with_experts(groups: list[Group], choose: Callable[[Trajectory], Experts]) -> list[Group]:
    return [
        dataclasses.replace(
            g, trajectories=tuple(dataclasses.replace(t, routed_experts=choose(t)) for t in g.trajectories)
        )
        for g in groups
    ]


def logprobs(trainer: TrainerRank) -> dict[int, float]:
    """Of the scored batch: log-prob at temperature 1 by global token id, where this rank knows it."""
    known: Any = trainer._known
    found: dict[int, float] = {}
    for data, scored in zip(known.data, known.scored, strict=True):
        ids = data.batch.global_id_T[data.owned_T].tolist()
        found |= dict(zip(ids, scored.raw_logprob_T[data.owned_T].tolist(), strict=True))
    return found if trainer.position().is_last_stage else {}


def replayed(rank: Rank, *, checkpoint: Path, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """One step of each case (fields of `[trainer]`) with random experts."""
    ports, found = Ports(rank), {}
    groups = with_experts(make_groups(), random_experts)
    for name, trainer_fields in cases.items():
        config = make_config(checkpoint, REPLAY | {"trainer": trainer_fields})
        trainer = start(ports.next(), config)
        gradients = keep_gradients(trainer)
        load(trainer, config, groups)
        reading = trainer.score()
        seen: dict[str, Any] = {"entropy": reading.entropy, "logprobs": logprobs(trainer)}
        stats = trainer.update(Control(True, 1.5, 0.5, reading.entropy, 9.0)).updates[0]
        seen |= {"loss": stats["update/loss"], "grad_norm": stats["update/grad_norm"], "kl": stats["update/kl"]}
        seen["gradient"] = gradients[0] if rank.rank == 0 else {}
        trainer.close()
        found[name] = seen
    return found


def own_choice(rank: Rank, *, checkpoint: Path) -> list[dict[int, float]]:
    """Log-probs without replay, and with what the routers chose then by upstream's own record."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    ports, groups = Ports(rank), make_groups()
    config = make_config(checkpoint, {})
    trainer = start(ports.next(), config)
    load(trainer, config, groups)
    trainer.score()
    plain = logprobs(trainer)
    routers = [m for m in trainer._chunks[0].modules() if isinstance(m, TopKRouter)]
    for router in routers:
        router.router_replay = RouterReplay()
        router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)

    def chosen(trajectory: Trajectory) -> Experts:
        trainer.score_tokens(trajectory.token_ids())
        by_layer = [router.router_replay.get_recorded_indices()[:-1] for router in routers]  # type: ignore[union-attr]
        return np.stack([x.numpy() for x in by_layer], 1).astype(np.uint8)

    groups = with_experts(groups, chosen)
    trainer.close()
    config = make_config(checkpoint, REPLAY)
    trainer = start(ports.next(), config)
    load(trainer, config, groups)
    trainer.score()
    again = logprobs(trainer)
    trainer.close()
    return [plain, again]


def mismatch(rank: Rank, *, checkpoint: Path, sampled: list[Any]) -> dict[bool, dict[str, float]]:
    """Metrics of a scored batch in bfloat16 without and with replay. `sampled`: as `replay_engine` writes it."""
    groups = []
    for g in range(0, len(sampled), 4):
        prompt = Prompt(f"p{g}", "test", "", tuple(sampled[g][0]), "")
        made = [_trajectory(prompt.id, i, *one) for i, one in enumerate(sampled[g : g + 4])]
        groups.append(Group(prompt, tuple(made), tuple(Score(float(i % 2), False, "") for i in range(len(made)))))
    ports, found = Ports(rank), {}
    for replay in (False, True):
        tables = {
            "model": {"path": str(checkpoint), "dtype": "bfloat16"},
            "inference": {"routing_replay": replay},
            "trainer": {"micro_batch_tokens": 512},
        }
        config = make_config(checkpoint, tables)
        trainer = start(ports.next(), config)
        load(trainer, config, groups)
        entropy = trainer.score().entropy
        scores = trainer.update(Control(True, 1.5, 0.5, entropy, 9.0)).scores
        found[replay] = {m.name: scores[m.name] for m in scores.measured}
        trainer.close()
    return found


def _trajectory(
    name: str, sample: int, prompt: list[int], response: list[int], logprobs: list[float], experts: Experts
):
    spans = (
        Span(SpanKind.PROMPT, np.array(prompt, np.int32), np.empty(0, np.float32)),
        Span(SpanKind.ACTION, np.array(response, np.int32), np.array(logprobs, np.float32)),
    )
    return Trajectory(name, sample, spans, Status.COMPLETED, (0, 0), sample, routed_experts=experts)


def refused(rank: Rank, *, checkpoint: Path) -> list[str]:
    """What is said of trajectories without experts, and of experts of another model."""
    config = make_config(checkpoint, REPLAY)
    trainer = start(rank, config)
    said = []
    other = {
        "none": make_groups(),
        "too many": with_experts(make_groups(), lambda t: random_experts(t) + np.uint8(EXPERTS)),
        "layers": with_experts(make_groups(), lambda t: random_experts(t)[:, 1:]),
    }
    for groups in other.values():
        try:
            load(trainer, config, groups)
        except RunError as e:
            said.append(str(e))
    trainer.close()
    return said
