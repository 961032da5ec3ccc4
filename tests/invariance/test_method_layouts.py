"""Each method and the rollout correction: one process, context parallelism and data parallelism take the same steps.

Two optimizer steps a batch, so that at the second one ratios differ from 1 and clips, penalties and sequence means act.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from launch import launch
from step_cases import make_checkpoint

ROLLOUT_MISMATCH = {"mode": "mask", "level": "sequence-mean", "low": 0.7, "high": 1.6}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "dapo": {"dapo": {"overlong_share": 0.9}},
    "dr_grpo": {},
    "gspo": {},
    "gmpo": {"clip_low": 0.01, "clip_high": 0.01},
    "cispo": {"clip_high": 0.01},
    "clip_cov": {"clip_cov": {"fraction": 0.1, "low": 0.0}},
    "kl_cov": {"kl_cov": {"fraction": 0.1}},
    "entropy_bonus": {"entropy_bonus": {"coefficient": 0.1}},
    "entropy_advantage": {},
    "high_entropy_tokens": {},
    "w_reinforce": {},
    "grpo": {"correction": ROLLOUT_MISMATCH},
    "stare": {"stare": {"weight": "auto", "variant": "C2"}},
}


def cases(methods: Iterable[str] = ALGORITHMS, **layout: Any) -> dict[str, dict[str, Any]]:
    shape = {"micro_batch_tokens": 64, "updates_per_batch": 2, "optimizer": {"lr": 1e-3}}
    return {name: {"trainer": shape | layout, "algorithm": {"method": name, **ALGORITHMS[name]}} for name in methods}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def outcomes(checkpoint) -> dict[str, dict[str, Any]]:
    """Results of rank 0, by layout and method."""
    done = {}
    for layout, ranks, settings in (
        ("one", 1, {}),
        ("CP2", 2, {"world_size": 2, "context_parallel": 2}),
        ("DP2", 2, {"world_size": 2}),
    ):
        done[layout] = launch(
            "step_cases:many", ranks, {"checkpoint": checkpoint, "cases": cases(**settings)}, timeout=300
        )[0]
    return done


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("layout", ["CP2", "DP2"])
def test_layout_does_not_change_a_step(outcomes, layout, method):
    wanted, seen = outcomes["one"][method]["stats"], outcomes[layout][method]["stats"]
    assert len(seen) == len(wanted) > 1
    for got, want in zip(seen, wanted, strict=True):
        assert got["update/loss"] == pytest.approx(want["update/loss"], abs=1e-5)
        assert got["update/grad_norm"] == pytest.approx(want["update/grad_norm"], rel=1e-4)
        assert got["update/clip_fraction"] == pytest.approx(want["update/clip_fraction"], abs=1e-9)
        for name in ("stare/selected_pos", "stare/selected_neg", "correction/bounded"):
            assert got[name] == want[name]
        assert got["correction/mean"] == pytest.approx(want["correction/mean"], abs=1e-6)


@pytest.fixture(scope="module")
def pipelined(checkpoint) -> list[dict[str, Any]]:
    """By rank, on two pipeline stages: the first does not see the loss."""
    layout = {"world_size": 2, "pipeline_parallel": 2}
    return launch("step_cases:many", 2, {"checkpoint": checkpoint, "cases": cases(("clip_cov", "stare"), **layout)})


def test_a_weight_that_sets_itself_reads_the_same_at_any_layout(outcomes, pipelined):
    """What the tokens, and L+ and L- of them, are expected to do, known before the update, on every rank; L+ and L- are
    all that sensitivity would choose."""
    wanted = [reading.forces for reading in outcomes["one"]["stare"]["readings"]]
    assert all(forces.chosen_pos > 0 > forces.chosen_neg for forces in wanted)
    others = [outcomes[layout]["stare"] for layout in ("CP2", "DP2")] + [rank["stare"] for rank in pipelined]
    for seen in others:
        for reading, want in zip(seen["readings"], wanted, strict=True):
            got = dataclasses.astuple(reading.forces)
            assert got == pytest.approx(dataclasses.astuple(want), abs=1e-6)
        assert [step["dynamics/overlap"] for step in seen["stats"]] == [1.0] * len(seen["stats"])


@pytest.mark.parametrize(("method", "name"), [("clip_cov", "loss/detached"), ("kl_cov", "loss/penalty")])
def test_what_a_loss_reports_is_the_same_at_any_layout(outcomes, pipelined, method, name):
    """Its sums and weights are over all ranks, and on ranks of the stages without loss too."""
    wanted = [s.part(name) for s in outcomes["one"][method]["stats"]]
    assert all(part.weight > 1 for part in wanted)
    assert max(part.value for part in wanted) > 0
    others = [outcomes[layout][method] for layout in ("CP2", "DP2")]
    others += [rank[method] for rank in pipelined if method in rank]
    assert len(others) == (4 if method == "clip_cov" else 2)
    for seen in others:
        got = [s.part(name) for s in seen["stats"]]
        assert [part.weight for part in got] == [part.weight for part in wanted]
        assert [part.total for part in got] == pytest.approx([part.total for part in wanted], abs=1e-4)


def test_methods_differ(outcomes):
    """Each acts: no two of them report the same losses and gradients."""
    second = [result["stats"][1] for result in outcomes["one"].values()]
    seen = {(s["update/loss"], s["update/grad_norm"]) for s in second}
    assert len(seen) == len(ALGORITHMS)
    assert outcomes["one"]["kl_cov"]["stats"][0]["stare/selected_pos"] > 0
    assert 0 < outcomes["one"]["grpo"]["stats"][0]["correction/bounded"] < 1
    assert outcomes["one"]["gspo"]["stats"][0]["correction/mean"] == 1.0


def test_mismatch_is_measured(outcomes):
    first = outcomes["one"]["gspo"]["scores"][0]
    assert first["mismatch/ratio_max"] > 1.0
    assert 0.0 < first["mismatch/ess"] < 1.0
    assert first["mismatch/sequence_ratio_max"] > 1.0
    assert 0.0 < first["mismatch/sequence_ess"] < first["mismatch/ess"]
    for layout in ("CP2", "DP2"):
        got = outcomes[layout]["gspo"]["scores"][0]
        assert got["mismatch/ratio_max"] == pytest.approx(first["mismatch/ratio_max"], rel=1e-4)
        assert got["mismatch/ess"] == pytest.approx(first["mismatch/ess"], abs=1e-5)
        assert got["mismatch/sequence_ratio_max"] == pytest.approx(first["mismatch/sequence_ratio_max"], rel=1e-4)
        assert got["mismatch/sequence_ess"] == pytest.approx(first["mismatch/sequence_ess"], abs=1e-5)
