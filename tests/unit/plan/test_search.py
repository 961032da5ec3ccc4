"""Layouts that `plan --search` proposes."""

from __future__ import annotations

from stare_megatron.plan.cures import changed_config
from stare_megatron.plan.estimate import make, ranks_fit
from stare_megatron.plan.search import search
from tests.unit.plan.models import ONE_NODE, ROLLOUT, TRAINER, config_of, given_for, shape_of


def test_proposals_fit_and_are_ranked() -> None:
    config = config_of("qwen2.5-7b", rollout=ROLLOUT, trainer=TRAINER | {"world_size": 16}, inference={"engines": 16})
    found = search(config, shape_of("qwen2.5-7b"), given_for(config))
    assert len(found) > 3
    seconds = [proposal.plan.seconds for proposal in found]
    assert seconds == sorted(seconds)
    assert all(not p.plan.violations and p.plan.gpus == 16 for p in found)
    best = changed_config(config, found[0].changes)
    assert make(best, shape_of("qwen2.5-7b"), given_for(config)).seconds == seconds[0]
    assert "MFU" in found[0].why


def test_32b_on_one_node_is_found_with_states_that_leave() -> None:
    shape = shape_of("qwen3-32b")
    config = config_of("qwen3-32b", rollout=ROLLOUT, **ONE_NODE)
    given = given_for(config)
    assert make(config, shape, given).violations
    found = search(config, shape, given)
    assert found
    assert all(proposal.plan.config.trainer.offload for proposal in found)
    bundles = [p for p in found if p.plan.config.trainer.offload_step_mb]
    # Bundles are for what does not fit without them.
    assert bundles
    for proposal in bundles:
        whole = changed_config(config, proposal.changes | {"trainer.offload_step_mb": 0})
        assert not ranks_fit(whole, shape, given)
    best = changed_config(config, found[0].changes)
    assert make(best, shape, given).violations == ()
    # The run chooses the engines' share itself.
    assert "inference.vllm.gpu_memory_utilization" not in found[0].changes


def test_placement_is_searched_where_sampling_allows_both() -> None:
    trainer = TRAINER | {"world_size": 16, "tensor_parallel": 4}
    separate = {"engines": 8, "placement": "separate"}
    config = config_of("qwen2.5-7b", rollout=ROLLOUT, trainer=trainer | {"world_size": 8}, inference=separate)
    found = search(config, shape_of("qwen2.5-7b"), given_for(config))
    assert {p.plan.config.inference.placement for p in found} == {"colocated", "separate"}
    assert {p.plan.gpus for p in found} == {16}
    assert all("parameters" not in p.plan.config.trainer.offload for p in found if "placement" not in str(p.changes))
    ahead = config_of(
        "qwen2.5-7b", rollout=ROLLOUT, trainer=trainer | {"world_size": 8}, inference=separate,
        algorithm={"correction": {"mode": "truncate"}}, sampling={"mode": "one_step"},
    )  # fmt: skip
    found = search(ahead, shape_of("qwen2.5-7b"), given_for(ahead))
    assert {p.plan.config.inference.placement for p in found} == {"separate"}


def test_experts_are_searched_too() -> None:
    config = config_of(
        "qwen3-30b-a3b", rollout=ROLLOUT, trainer={"world_size": 32}, inference={"engines": 16, "tensor_parallel": 2}
    )
    found = search(config, shape_of("qwen3-30b-a3b"), given_for(config))
    assert found
    assert found[0].plan.config.trainer.expert_parallel > 1
    assert len({p.plan.config.trainer.expert_parallel for p in found}) > 2
