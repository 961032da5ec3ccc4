"""Routing replay: the experts that trajectories bring are those that scoring and update use, under every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from launch import launch
from replay_cases import random_experts
from step_cases import first_tokens, make_groups

TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
ETP1 = {"megatron": {"expert_tensor_parallel_size": 1}}
FULL, MOE = {"recompute": "full"}, {"recompute": "selective", "recompute_modules": ["moe"]}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one rank": {}, "one sequence a micro-batch": {"micro_batch_tokens": 1}, "full": FULL, "moe": MOE},
    2: {
        "TP2 SP": TP2_SP,
        "TP2 SP EP2": TP2_SP | {"expert_parallel": 2} | ETP1,
        "CP2": {"context_parallel": 2},
        "PP2 full": {"pipeline_parallel": 2, "micro_batch_tokens": 24} | FULL,
        "PP2 VPP2 moe": {"pipeline_parallel": 2, "virtual_pipeline": 2, "micro_batch_tokens": 24} | MOE,
        "EP2": {"expert_parallel": 2},
    },
}
CASES = [(ranks, name) for ranks, own in LAYOUTS.items() for name in own]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def outcome(checkpoint: Path) -> Any:
    @functools.cache
    def of(ranks: int) -> list[dict[str, dict[str, Any]]]:
        cases = {
            name: {"world_size": ranks, "micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}} | fields
            for name, fields in LAYOUTS[ranks].items()
        }
        return launch("replay_cases:replayed", ranks, {"checkpoint": checkpoint, "cases": cases})

    return of


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_every_layout_gives_the_same(outcome, ranks, name):
    want = outcome(1)[0]["one rank"]
    by_rank = [seen[name] for seen in outcome(ranks)]
    found = {token: value for seen in by_rank for token, value in seen["logprobs"].items()}
    assert found.keys() == want["logprobs"].keys()
    assert max(abs(found[token] - want["logprobs"][token]) for token in found) < 2e-5
    for seen in by_rank:
        assert seen["entropy"] == pytest.approx(want["entropy"], abs=2e-6)
        assert seen["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert seen["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert seen["kl"] < 1e-9  # the update pass is routed as the scoring pass was
    for parameter, values in want["gradient"].items():
        assert float((by_rank[0]["gradient"][parameter] - values).abs().max()) < 1e-5, parameter


def test_against_transformers(checkpoint, outcome, monkeypatch):
    """The same experts, forced upon transformers' routers; their weights come from its own logits."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    routers = [m for m in model.modules() if isinstance(m, Qwen3MoeTopKRouter)]
    groups = make_groups()
    firsts = first_tokens(groups)
    forced: dict[Any, torch.Tensor] = {}

    def route(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        chosen = forced[self]
        weights = logits.softmax(-1, dtype=torch.float32).gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True), chosen

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", route)
    found = outcome(1)[0]["one rank"]["logprobs"]
    compared = 0
    for trajectory in (t for g in groups for t in g.trajectories):
        first = firsts.get((trajectory.prompt_id, trajectory.sample))
        if first is None:
            continue
        ids = torch.from_numpy(trajectory.token_ids()).long()
        experts = torch.from_numpy(random_experts(trajectory)).long()
        forced.update({router: experts[:, n] for n, router in enumerate(routers)})
        with torch.no_grad():
            logprob = model(ids[None, :-1]).logits[0].float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        for place in trajectory.action_mask().nonzero()[0].tolist():
            assert found[first + place] == pytest.approx(float(logprob[place - 1]), abs=2e-5)
            compared += 1
    assert compared == len(found)


def test_the_routers_own_choice_changes_nothing(checkpoint):
    plain, again = launch("replay_cases:own_choice", 1, {"checkpoint": checkpoint})[0]
    assert plain == again
    assert len(plain) > 100


def test_other_experts_give_other_log_probs(checkpoint, outcome):
    plain, _ = launch("replay_cases:own_choice", 1, {"checkpoint": checkpoint})[0]
    replayed = outcome(1)[0]["one rank"]["logprobs"]
    assert np.mean([abs(plain[token] - replayed[token]) for token in plain]) > 0.05


def test_what_does_not_fit_is_refused(checkpoint):
    none, many, layers = launch("replay_cases:refused", 1, {"checkpoint": checkpoint})[0]
    assert "p0/0: its engine returned no experts; inference.routing_replay" in none
    assert "up to 7 from the engine, but the model has 4 layers with 2 of 4" in many
    assert "experts (3, 2)" in layers
