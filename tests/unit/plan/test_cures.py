"""What does not fit is said at once, each with what mends it."""

from __future__ import annotations

import dataclasses
import math
import re

from stare_megatron.plan.estimate import make
from tests.unit.plan.models import ONE_NODE, ROLLOUT, TRAINER, config_of, given_for, plan_of, shape_of

GIB = 2**30


def test_every_violation_at_once_with_its_cure() -> None:
    plan = plan_of(
        trainer={"world_size": 24, "tensor_parallel": 3, "pipeline_parallel": 1, "recompute": "none"},
        inference={"engines": 40, "tensor_parallel": 6},
        rollout={"max_response_tokens": 60_000},
        nodes=2,
    )
    said = "\n".join(plan.violations)
    for part in (
        "trainer.tensor_parallel = 3 does not divide",
        "inference.tensor_parallel = 6 does not divide",
        "allows at most 40960 tokens",
        "colocated engines share the trainer's 24",
        "--nodes 2 of 8 are 16",
        "update: rank + engine takes",
    ):
        assert part in said
    assert all(re.search("choose|lower|raise|set |must divide", problem) for problem in plan.violations)


def test_the_share_that_is_named_as_a_cure_cures() -> None:
    plan = plan_of()
    (problem,) = plan.violations
    assert "set inference.vllm.gpu_memory_utilization = 0." in problem
    share = float(problem.partition("gpu_memory_utilization = ")[2].partition(",")[0])
    cured = plan_of(inference={"vllm": {"gpu_memory_utilization": share}})
    assert cured.violations == ()
    assert cured.room.at_full > 1
    assert math.isfinite(cured.seconds)


def test_a_cure_of_memory_is_tried_before_it_is_named() -> None:
    trainer = TRAINER | {"recompute": "none", "micro_batch_tokens": 32768}
    plan = plan_of("qwen2.5-7b", trainer=trainer | {"world_size": 8, "tensor_parallel": 2}, inference={"engines": 2})
    (problem,) = [p for p in plan.violations if p.startswith("update")]
    assert "set trainer.recompute=" in problem
    again = {"recompute": problem.rpartition("trainer.recompute=")[2].partition(",")[0]}
    cured = plan_of(
        "qwen2.5-7b", trainer=trainer | again | {"world_size": 8, "tensor_parallel": 2}, inference={"engines": 2}
    )
    assert [p for p in cured.violations if p.startswith("update")] == []


def test_engines_that_find_no_room_beside_ranks_have_these_give_their_states_away() -> None:
    trainer = {"world_size": 8, "tensor_parallel": 1, "sequence_parallel": False}
    plan = plan_of("qwen2.5-7b", trainer=trainer, inference={"engines": 8, "tensor_parallel": 1})
    (problem,) = [p for p in plan.violations if p.startswith("rollout")]
    assert problem.endswith('; set trainer.offload=["optimizer"]')
    cured = plan_of(
        "qwen2.5-7b", trainer=trainer | {"offload": ["optimizer"]}, inference={"engines": 8, "tensor_parallel": 1}
    )
    assert cured.violations == ()


def test_engines_that_want_nearly_a_whole_gpu_are_placed_apart() -> None:
    trainer = {"world_size": 8, "tensor_parallel": 1, "sequence_parallel": False}
    engines = {"engines": 8, "tensor_parallel": 1, "vllm": {"gpu_memory_utilization": 0.97}}
    plan = plan_of("qwen2.5-7b", trainer=trainer, inference=engines)
    assert plan.violations
    assert all("set inference.placement=separate" in problem for problem in plan.violations)


def test_32b_on_one_node_is_cured_by_offload() -> None:
    """68.6 GiB of states a GPU, of which 45.8 are the optimizer's: these leave but for its step."""
    engines = ONE_NODE["inference"]
    plan = plan_of(trainer=ONE_NODE["trainer"], inference=engines)
    assert [problem.partition(":")[0] for problem in plan.violations[1:]] == ["rollout", "push"]
    assert all(problem.endswith('set trainer.offload=["optimizer"]') for problem in plan.violations)
    away = {"offload": ["optimizer"]}
    assert plan_of(trainer=ONE_NODE["trainer"] | away, inference=engines).violations == ()


def test_a_step_too_large_for_a_gpu_is_cured_by_bundles() -> None:
    """A GPU of 64 GiB does not hold the 68.6 at once."""
    config = config_of(
        "qwen3-32b", rollout=ROLLOUT, trainer=TRAINER | ONE_NODE["trainer"], inference=ONE_NODE["inference"]
    )
    given = given_for(config)
    small = dataclasses.replace(given.machine.gpu, memory=64 * GIB)
    given = dataclasses.replace(given, machine=dataclasses.replace(given.machine, gpu=small))
    problems = make(config, shape_of("qwen3-32b"), given).violations
    assert problems
    assert all("trainer.offload=" in problem for problem in problems)
    assert all(problem.endswith("trainer.offload_step_mb=4096") for problem in problems)


def test_no_cure_is_named_that_the_model_cannot_have() -> None:
    """28 heads and 4 groups: TP 8, which would fit, does not divide them."""
    trainer = {"world_size": 8, "tensor_parallel": 4, "micro_batch_tokens": 2**19, "recompute": "none"}
    rollout = {"max_response_tokens": 30_000}
    plan = plan_of("qwen2.5-7b", trainer=trainer, rollout=rollout, inference={"engines": 2})
    (problem,) = [p for p in plan.violations if p.startswith("update")]
    assert "tensor_parallel=8" not in problem
    assert re.search("set trainer|no single setting", problem)
