"""The planner's counts against real ranks: parameters, and the bytes of everything a rank holds, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
from launch import free_port, launch
from plan_worker import Counted

from stare_megatron.config import TrainerConfig
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.parameters import Layout, held, largest

_SP = {"tensor_parallel": 2, "sequence_parallel": True}
_WHOLE = {"megatron": {"expert_tensor_parallel_size": 1}}
# Ranks -> (checkpoint, dtype, trainer).
QUICK: dict[int, list[tuple[str, str, dict[str, Any]]]] = {
    1: [
        ("qwen2", "bfloat16", {}),
        ("qwen3_moe", "float32", {}),
        ("llama", "bfloat16", {"distributed_optimizer": False}),
    ],
    2: [
        ("qwen2", "bfloat16", {}),
        ("qwen2", "bfloat16", {"tensor_parallel": 2}),
        ("qwen2", "bfloat16", {"pipeline_parallel": 2}),
        ("qwen3", "float32", {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        ("qwen3_moe", "bfloat16", {"expert_parallel": 2}),
        ("mistral", "bfloat16", {"tensor_parallel": 2}),
        ("mixtral", "bfloat16", {"expert_parallel": 2}),
        ("phi3", "bfloat16", {"pipeline_parallel": 2}),
        ("qwen2_moe", "bfloat16", {"expert_parallel": 2}),
        ("qwen2_moe", "bfloat16", {"tensor_parallel": 2}),
        ("qwen3_moe_tied", "bfloat16", {"pipeline_parallel": 2, "distributed_optimizer": False}),
    ],
}
# Of four ranks and eight those in which kinds of parallelism meet; CI runs them.
MIXED: dict[int, list[tuple[str, str, dict[str, Any]]]] = {
    4: [
        ("qwen2", "bfloat16", _SP),
        ("qwen3", "bfloat16", {"tensor_parallel": 2, "pipeline_parallel": 2}),
        ("qwen3", "bfloat16", {"pipeline_parallel": 4, "distributed_optimizer": False}),
        ("r1_llama", "bfloat16", {"context_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2}),
        ("qwen2", "bfloat16", {"pipeline_parallel": 2}),
        ("r1_llama", "bfloat16", {}),
        ("qwen3_moe", "bfloat16", {"expert_parallel": 4}),
        ("qwen3_moe", "bfloat16", _SP | {"expert_parallel": 4} | _WHOLE),
        ("mixtral", "bfloat16", {"expert_parallel": 2, "pipeline_parallel": 2}),
        ("mixtral", "bfloat16", _SP | {"expert_parallel": 2} | _WHOLE),
        (
            "qwen2_moe",
            "bfloat16",
            {"expert_parallel": 2, "context_parallel": 2, "distributed_optimizer": False},
        ),
        ("qwen2_moe", "bfloat16", {"tensor_parallel": 2}),
        ("qwen3_moe_tied", "bfloat16", {"expert_parallel": 2}),
        ("r1_llama", "bfloat16", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
    8: [
        ("qwen2", "bfloat16", _SP | {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        ("qwen3_moe", "bfloat16", _SP | {"pipeline_parallel": 2, "expert_parallel": 2} | _WHOLE),
    ],
}
WIDE: dict[int, list[tuple[str, str, dict[str, Any]]]] = {
    2: [
        (name, dtype, trainer)
        for name in (
            "llama3",
            "qwen3",
            "qwen3_tied",
            "qwen3_moe",
            "mistral",
            "mixtral",
            "phi3",
            "qwen2_moe",
            "qwen2_moe_tied",
        )
        for dtype in ("bfloat16", "float32")
        for trainer in (
            {"context_parallel": 2},
            {"pipeline_parallel": 2, "virtual_pipeline": 2},
            {"tensor_parallel": 2},
        )
    ],
    4: [
        *(
            (name, "bfloat16", trainer)
            for name in ("qwen2", "qwen3", "r1_llama")
            for trainer in (
                {},
                _SP,
                {"tensor_parallel": 2, "pipeline_parallel": 2},
                {"pipeline_parallel": 2},
                {"pipeline_parallel": 4, "distributed_optimizer": False},
                {"context_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2},
            )
        ),
        *(
            (name, "bfloat16", trainer)
            for name in ("qwen3_moe", "qwen3_moe_tied", "mixtral", "qwen2_moe")
            for trainer in (
                {"expert_parallel": 4},
                {"expert_parallel": 2},
                {"expert_parallel": 2, "pipeline_parallel": 2},
                {"expert_parallel": 2, "context_parallel": 2, "distributed_optimizer": False},
                _SP | {"expert_parallel": 2} | _WHOLE,
                _SP | {"expert_parallel": 4} | _WHOLE,
                {"tensor_parallel": 2},
            )
        ),
    ],
    8: [
        ("qwen3", "bfloat16", {"tensor_parallel": 2, "context_parallel": 2}),
        ("qwen3_moe", "float32", _SP | {"expert_parallel": 4, "context_parallel": 2} | _WHOLE),
    ],
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    names = {name for table in (QUICK, MIXED, WIDE) for cases in table.values() for name, _, _ in cases}
    return {name: checkpoints.make(name, folder) for name in sorted(names)}


def compare(ranks: int, cases: list[tuple[str, str, dict[str, Any]]], paths: dict[str, Path]) -> None:
    asked = [{"path": str(paths[n]), "port": free_port(), "dtype": d, "trainer": t} for n, d, t in cases]
    by_rank = launch("plan_worker:run", ranks, {"cases": asked})
    for i, (name, dtype, trainer) in enumerate(cases):
        shape, layout = read_hf_config(paths[name]), Layout.of(TrainerConfig(world_size=ranks, **trainer))
        most: dict[int, int] = {}
        for rank in range(ranks):
            have: Counted = by_rank[rank][i]
            mine = held(shape, layout, rank)
            state = mine.state(dtype, sharded=layout.sharded)
            what = Counted(mine.parameters, state.parameters, state.gradients, state.master, state.moments)
            assert what == have, f"{name}, {dtype}, {trainer}, rank {rank}"
            stage = rank // (ranks // layout.pipeline)
            most[stage] = max(most.get(stage, 0), state.total)
        for stage, total in most.items():
            bound = largest(shape, layout, stage).state(dtype, sharded=layout.sharded).total
            assert total <= bound <= total + 12 * 128 * 8 * 4, "a bound, beyond the truth by padding alone"


@pytest.mark.parametrize("ranks", QUICK)
def test_a_rank_holds_what_the_plan_says(ranks: int, paths: dict[str, Path]) -> None:
    compare(ranks, QUICK[ranks], paths)


@pytest.mark.runs
@pytest.mark.parametrize("ranks", MIXED)
def test_a_rank_holds_what_the_plan_says_where_kinds_of_parallelism_meet(ranks: int, paths: dict[str, Path]) -> None:
    compare(ranks, MIXED[ranks], paths)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", WIDE)
def test_a_rank_holds_what_the_plan_says_at_every_layout(ranks: int, paths: dict[str, Path]) -> None:
    compare(ranks, [case for case in WIDE[ranks] if case not in MIXED.get(ranks, [])], paths)
