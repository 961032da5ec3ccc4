"""`trainer.scoring = "rollout"`: the same step as after a scoring pass where engine and trainer agree, the same
measurements where it does not, and the same decisions, to the bit, at every layout."""

from typing import Any

import pytest
import torch
from launch import launch
from scoring_cases import ROLLOUT
from step_cases import first_tokens, make_checkpoint, make_groups

from stare_megatron.algo import controller
from stare_megatron.config import AlgorithmConfig
from stare_megatron.types import SpanKind, Status

C2 = {"variant": "C2", "fraction": 0.1, "target_entropy": 9.0}
BOTH_WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "stare": (True, {}),
    "stare by micro-batch": (
        True,
        {"algorithm": {"method": "stare", "stare": C2 | {"scope": "microbatch", "selector": "sensitivity"}}},
    ),
    "kl_cov": (True, {"algorithm": {"method": "kl_cov", "kl_cov": {"fraction": 0.1}}}),
    "entropy bonus, logits in chunks": (
        False,
        {"algorithm": {"method": "entropy_bonus"}, "trainer": {"logits_chunk_tokens": 7}},
    ),
    "token correction": (False, {"algorithm": {"method": "grpo", "correction": {"mode": "truncate", "high": 1.2}}}),
    "sequence correction": (
        False,
        {
            "algorithm": {
                "method": "gspo",
                "correction": {"mode": "mask", "level": "sequence-mean", "low": 0.9, "high": 1.2},
            }
        },
    ),
}


def layout(ranks: int, **keys: Any) -> dict[str, Any]:
    return {"trainer": {"world_size": ranks, "micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}} | ROLLOUT | keys}


CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "reference": layout(1),
        "one micro-batch": layout(1, micro_batch_tokens=100_000),
        "scoring pass": layout(1, scoring="trainer"),
    },
    2: {
        "TP2": layout(2, tensor_parallel=2),
        "PP2 VPP2": layout(2, pipeline_parallel=2, virtual_pipeline=2),
        "DP2, one sequence a micro-batch": layout(2, micro_batch_tokens=1),
        "CP2": layout(2, context_parallel=2),
        "DP2, other order": layout(2) | {"batch": {"order": 3}},
    },
}
LAYOUTS = [(1, "one micro-batch"), *((2, name) for name in CASES[2])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def both(checkpoint):
    return launch("scoring_cases:both_ways", 1, {"checkpoint": checkpoint, "cases": BOTH_WAYS})[0]


@pytest.fixture(scope="module")
def outcomes(checkpoint):
    """By number of ranks, then by rank."""
    return {
        ranks: launch("step_cases:many", ranks, {"checkpoint": checkpoint, "cases": cases})
        for ranks, cases in CASES.items()
    }


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_step_is_the_one_after_a_scoring_pass(both, name):
    """To the bit: the update pass's forward is the scoring pass's."""
    got, want = both[name]["rollout"], both[name]["trainer"]
    assert got["selected"] == want["selected"]
    assert got["scores"] == want["scores"]
    assert got["stats"] == want["stats"]
    assert got["stats"]["update/ratio_max"] == 1.0
    assert (got["stats"]["update/kl"], got["stats"]["update/clip_fraction"]) == (0.0, 0.0)
    assert got["stats"]["dynamics/non_finite"] == 0
    assert got["gradient"].keys() == want["gradient"].keys()
    assert all(torch.equal(got["gradient"][k], want["gradient"][k]) for k in want["gradient"])


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_the_gate_reads_the_surprisal_under_the_engine(both, name):
    got, want = both[name]["rollout"], both[name]["trainer"]
    assert got["reading"].num_action_tokens == want["reading"].num_action_tokens
    assert (
        got["reading"].entropy == got["scores"]["policy/entropy_estimate"] == want["scores"]["policy/entropy_estimate"]
    )
    assert want["reading"].entropy == want["scores"]["policy/entropy"]
    assert got["reading"].entropy != want["reading"].entropy
    if BOTH_WAYS[name][0]:
        assert got["scores"]["policy/entropy_estimate"] == got["scores"]["policy/surprisal"]
        assert got["scores"]["mismatch/max"] == 0.0


def test_corrections_act(both):
    for name in ("token correction", "sequence correction"):
        assert 0.0 < both[name]["rollout"]["stats"]["correction/bounded"] < 1.0
        assert both[name]["rollout"]["stats"]["correction/mean"] != 1.0


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_decisions_are_bit_identical(outcomes, ranks, name):
    """They follow from the engines' log-probs alone: also at a target next to the entropy in floating point."""
    want = outcomes[1][0]["reference"]
    seen = [by_case[name] for by_case in outcomes[ranks]]
    last = [s for s in seen if s["position"].is_last_stage and s["position"].tensor_parallel_rank == 0]
    for batch in range(2):
        ids = [i for s in last for i in s["selected"][batch]]
        assert sorted(ids) == sorted(want["selected"][batch])
    target = torch.nextafter(torch.tensor(want["readings"][0].entropy, dtype=torch.float64), torch.tensor(9.0)).item()
    config = AlgorithmConfig.model_validate(
        {"method": "stare", "stare": C2 | {"target_entropy": target, "controller": "proportional"}}
    )
    for s in seen:
        assert s["readings"] == want["readings"]
        state, control = controller.observe(config, controller.initial(config), s["readings"][0])
        assert control.gate_on
        assert (state, control) == controller.observe(config, controller.initial(config), want["readings"][0])


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_loss_and_gradient(outcomes, ranks, name):
    want = outcomes[1][0]["reference"]
    for by_case in outcomes[ranks]:
        for got, stats in zip(by_case[name]["stats"], want["stats"], strict=True):
            assert got["update/loss"] == pytest.approx(stats["update/loss"], abs=1e-5)
            assert got["update/grad_norm"] == pytest.approx(stats["update/grad_norm"], rel=1e-4)
            for chosen in ("stare/selected_pos", "stare/selected_neg"):
                assert got[chosen] == stats[chosen]
            assert (got["update/ratio_max"], got["update/kl"]) == (1.0, 0.0)
    got = outcomes[ranks][0][name]["gradient"]
    for parameter, values in want["gradient"].items():
        assert float((got[parameter] - values).abs().max()) < 1e-5, parameter


@pytest.mark.parametrize(("ranks", "name"), [(1, "reference"), *LAYOUTS])
def test_what_the_update_pass_measures_is_what_the_scoring_pass_would(outcomes, ranks, name):
    """Entropy, mismatch and dynamics of the first batch; afterwards the two have chosen other tokens."""
    with_pass = outcomes[1][0]["scoring pass"]
    want, wanted = with_pass["scores"][0], with_pass["stats"][0]
    for by_case in outcomes[ranks]:
        got, found = by_case[name]["scores"][0], by_case[name]["stats"][0]
        assert got.num_action_tokens == want.num_action_tokens
        assert got["policy/entropy_estimate"] == want["policy/entropy_estimate"]
        for field in (
            "policy/entropy",
            "policy/surprisal",
            "mismatch/mean",
            "mismatch/max",
            "mismatch/kl",
            "mismatch/ess",
        ):
            assert got[field] == pytest.approx(want[field], abs=2e-6)
        for field, error in (("predicted_change_unweighted", 1e-4), ("critical_surprisal", 1e-2)):
            sums = (s.part(f"dynamics/{field}").total for s in (found, wanted))
            assert next(sums) == pytest.approx(next(sums), abs=error)
        assert found["dynamics/non_finite"] == 0


def test_the_chosen_tokens_are_those_of_highest_surprisal_under_the_engine(outcomes):
    chosen = []
    for sign in (1, -1):
        tokens = sorted((s, i) for a, s, i in engine_tokens() if a * sign > 0)
        count = -(-len(tokens) // 10)
        chosen += [i for _, i in tokens[-count:]]
    reference = outcomes[1][0]["reference"]
    assert sorted(reference["selected"][0]) == sorted(chosen)
    assert sorted(outcomes[1][0]["scoring pass"]["selected"][0]) != sorted(chosen)
    surprisals = [s for _, s, _ in engine_tokens()]
    assert reference["readings"][0].entropy == pytest.approx(sum(surprisals) / len(surprisals), abs=1e-6)


def engine_tokens() -> list[tuple[float, float, int]]:
    """(advantage up to a positive factor, surprisal under the engine, global id) of each action token."""
    groups = make_groups()
    firsts = first_tokens(groups)
    found = []
    for group in groups:
        played = [s.reward for t, s in zip(group.trajectories, group.scores, strict=True) if t.status != Status.FAILED]
        for trajectory, score in zip(group.trajectories, group.scores, strict=True):
            place = firsts.get((trajectory.prompt_id, trajectory.sample), -1)
            for span in trajectory.spans if place >= 0 else ():
                if span.kind is SpanKind.ACTION:
                    ids = range(place, place + len(span.token_ids))
                    advantage = score.reward - sum(played) / len(played)
                    found += [(advantage, -float(x), i) for x, i in zip(span.logprobs, ids, strict=True)]
                place += len(span.token_ids)
    return found


def test_non_finite_values_stop_the_run_before_the_weights_change(checkpoint):
    (said,) = launch("scoring_cases:failures", 1, {"checkpoint": checkpoint})
    engine, policy, unchanged, finite = said
    assert engine.startswith("rollout: of ")
    assert engine.endswith("1 have a non-finite log-prob under the engine")
    assert policy.startswith("update pass: of ")
    assert "non-finite entropy" in policy
    assert (unchanged, finite) == ("True", "True")
