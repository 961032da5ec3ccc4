"""Model operations of each phase, by definition, for groups that share prompts, use tools or carry no loss."""

from __future__ import annotations

import dataclasses
import math

import pytest

from stare_megatron.metrics.catalogue import by_name
from stare_megatron.metrics.reduce import reduce
from stare_megatron.run.rates import Rates, rates_of
from stare_megatron.types import EpisodeCounts, GroupSummary, SequenceCost, Status
from tests.configs import configuration

COST = SequenceCost(linear=10.0, quadratic=2.0)
SECONDS = {"rollout": 4.0, "score": 2.0, "update": 8.0}
RATES = Rates(COST, ranks=4, workers=2, devices=6, peak=1e3, scores=True)


def group(tokens, actions, observations=None, statuses=None) -> GroupSummary:
    n = len(tokens)
    return GroupSummary(
        prompt_id="a",
        source="s",
        rewards=(0.0,) * n,
        correct=(False,) * n,
        num_tokens=tuple(tokens),
        num_action_tokens=tuple(actions),
        statuses=tuple(statuses or [Status.COMPLETED] * n),
        weight_versions=(0,) * n,
        graded=(True,) * n,
        reflections=(0,) * n,
        distinct_correct=0,
        episodes=tuple(EpisodeCounts(1, 0, 0, 0.0, o, False) for o in observations or ()),
    )


def test_a_prompt_is_computed_once_for_its_samples_and_dropped_groups_are_sampled_too():
    kept, dropped = group([7, 9], [4, 6]), group([5], [2])
    found = by_name(reduce(RATES.of_phases([kept, dropped], [kept], SECONDS)))
    prompt = 3 * 10 + 9 * 2
    both = (7 * 10 + 49 * 2) + (9 * 10 + 81 * 2)
    sampling = prompt + (both - 2 * prompt) + (5 * 10 + 25 * 2)
    assert found["rates/rollout_tflops"] == pytest.approx(sampling / 1e12 / (4.0 * 2))
    assert found["rates/score_tflops"] == pytest.approx(both / 1e12 / (2.0 * 4))
    assert found["rates/update_tflops"] == pytest.approx(3 * both / 1e12 / (8.0 * 4))
    for phase in SECONDS:
        assert found[f"rates/{phase}_mfu"] == pytest.approx(found[f"rates/{phase}_tflops"] * 1e12 / 1e3)


def test_what_a_tool_wrote_is_no_prompt_and_what_carries_no_loss_is_not_trained():
    statuses = [Status.COMPLETED, Status.FAILED, Status.COMPLETED]
    tools = group([20, 12, 11], [5, 4, 0], [12, 5, 8], statuses)
    found = by_name(reduce(RATES.of_phases([tools], [tools], SECONDS)))
    prompt = COST(3)
    sampling = prompt + sum(COST(n) - prompt for n in (20, 12, 11))
    assert found["rates/rollout_tflops"] == pytest.approx(sampling / 1e12 / 8.0)
    assert found["rates/score_tflops"] == pytest.approx(COST(20) / 1e12 / 8.0)


def test_without_a_scoring_pass_or_a_known_gpu_nothing_is_claimed():
    blind = dataclasses.replace(RATES, peak=math.nan, scores=False)
    found = by_name(reduce(blind.of_phases([group([7], [4])], [group([7], [4])], SECONDS)))
    assert found["rates/score_tflops"] == 0
    assert math.isnan(found["rates/update_mfu"])


@pytest.mark.parametrize(("engines", "devices"), [({"placement": "separate"}, 10), ({}, 6)])
def test_colocated_engines_have_their_devices_from_the_ranks(engines, devices):
    config = configuration(trainer={"world_size": 4}, inference={"engines": 3, "tensor_parallel": 2} | engines)
    found = rates_of(config, COST, 1e3)
    assert (found.ranks, found.workers, found.devices) == (4, 6, devices)
    assert found.of_step(600, 10.0).value == 600 / 10.0 / devices
