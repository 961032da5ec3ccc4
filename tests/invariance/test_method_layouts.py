"""Each method and the rollout correction: one process, context parallelism and data parallelism take the same steps.

Two optimizer steps a batch, so that at the second one ratios differ from 1 and clips, penalties and sequence means act.
"""

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
}


def cases(**layout: Any) -> dict[str, dict[str, Any]]:
    shape = {"micro_batch_tokens": 64, "updates_per_batch": 2, "optimizer": {"lr": 1e-3}}
    return {
        name: {"trainer": shape | layout, "algorithm": {"method": name, **extra}} for name, extra in ALGORITHMS.items()
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Results of rank 0, by layout and method."""
    checkpoint: Path = make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")
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
        assert got.loss == pytest.approx(want.loss, abs=1e-5)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
        assert got.clip_fraction == pytest.approx(want.clip_fraction, abs=1e-9)
        assert (got.selected_pos, got.selected_neg) == (want.selected_pos, want.selected_neg)
        assert got.correction_mean == pytest.approx(want.correction_mean, abs=1e-6)
        assert got.correction_bounded == want.correction_bounded


def test_methods_differ(outcomes):
    """Each acts: no two of them report the same losses and gradients."""
    seen = {(s.loss, s.grad_norm) for result in outcomes["one"].values() for s in result["stats"][1:2]}
    assert len(seen) == len(ALGORITHMS)
    assert outcomes["one"]["kl_cov"]["stats"][0].selected_pos > 0
    assert 0 < outcomes["one"]["grpo"]["stats"][0].correction_bounded < 1
    assert outcomes["one"]["gspo"]["stats"][0].correction_mean == 1.0


def test_mismatch_is_measured(outcomes):
    first = outcomes["one"]["gspo"]["scores"][0]
    assert first.mismatch.ratio_max > 1.0
    assert 0.0 < first.mismatch.ess < 1.0
    assert first.mismatch.sequence_ratio_max > 1.0
    assert 0.0 < first.mismatch.sequence_ess < first.mismatch.ess
    for layout in ("CP2", "DP2"):
        got = outcomes[layout]["gspo"]["scores"][0]
        assert got.mismatch.ratio_max == pytest.approx(first.mismatch.ratio_max, rel=1e-4)
        assert got.mismatch.ess == pytest.approx(first.mismatch.ess, abs=1e-5)
        assert got.mismatch.sequence_ratio_max == pytest.approx(first.mismatch.sequence_ratio_max, rel=1e-4)
        assert got.mismatch.sequence_ess == pytest.approx(first.mismatch.sequence_ess, abs=1e-5)
