"""One fixed batch under every layout: the same losses, gradient norms, entropies and chosen tokens.

Not exercised here: Transformer Engine, NCCL, bf16, experts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import launch
from step_cases import PROBE, make_checkpoint


def trainer(**settings: Any) -> dict[str, dict[str, Any]]:
    return {"trainer": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}} | settings}


CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "reference": trainer(),
        "one sequence a micro-batch": trainer(micro_batch_tokens=1),
        "one micro-batch": trainer(micro_batch_tokens=100_000),
        "no distributed optimizer": trainer(distributed_optimizer=False),
        "full recompute": trainer(recompute="full"),
    },
    2: {
        "TP2": trainer(world_size=2, tensor_parallel=2),
        "TP2 SP": trainer(world_size=2, tensor_parallel=2, sequence_parallel=True),
        "PP2": trainer(world_size=2, pipeline_parallel=2),
        "PP2 VPP2": trainer(world_size=2, pipeline_parallel=2, virtual_pipeline=2),
        "DP2": trainer(world_size=2),
        "DP2, one sequence a micro-batch": trainer(world_size=2, micro_batch_tokens=1),
        "PP2, one sequence a micro-batch": trainer(world_size=2, pipeline_parallel=2, micro_batch_tokens=1),
        "CP2": trainer(world_size=2, context_parallel=2),
    },
    4: {
        "TP2 PP2": trainer(world_size=4, tensor_parallel=2, pipeline_parallel=2),
        "DP4, one sequence a micro-batch": trainer(world_size=4, micro_batch_tokens=1),
    },
}
LAYOUTS = [(ranks, name) for ranks, cases in CASES.items() for name in cases if name != "reference"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def outcome(checkpoint):
    """Results of a case by rank; all cases of one world size share their processes."""
    done: dict[int, list[dict[str, Any]]] = {}

    def of(ranks: int, name: str) -> list[dict[str, Any]]:
        if ranks not in done:
            arguments = {"checkpoint": checkpoint, "cases": CASES[ranks]}
            done[ranks] = launch("step_cases:many", ranks, arguments, timeout=400)
        return [by_case[name] for by_case in done[ranks]]

    return of


@pytest.fixture(scope="module")
def reference(outcome) -> dict[str, Any]:
    return outcome(1, "reference")[0]


def test_reference_is_a_real_step(reference):
    first, second = reference["stats"]
    assert first.ratio_max == 1.0  # on-policy: the update's log-probs are those of the scoring pass, to the bit
    assert (first.clip_fraction, first.kl) == (0.0, 0.0)
    assert first.num_pos + first.num_neg < reference["scores"][0].num_action_tokens  # some groups have no advantage
    assert first.selected_pos == -(-first.num_pos // 10)
    assert first.selected_neg == -(-first.num_neg // 10)
    assert first.grad_norm > 0.1
    assert second.loss != first.loss


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_loss_and_gradient_norm(outcome, reference, ranks, name):
    for seen in outcome(ranks, name):
        for got, want in zip(seen["stats"], reference["stats"], strict=True):
            assert got.loss == pytest.approx(want.loss, abs=1e-5)
            assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
            assert got.learning_rate == want.learning_rate
            counts = ("num_pos", "num_neg", "selected_pos", "selected_neg")
            assert [getattr(got, c) for c in counts] == [getattr(want, c) for c in counts]


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_chosen_tokens_are_the_same(outcome, reference, ranks, name):
    """L+ and L- of the first batch: every token chosen on one data- or context-parallel rank and on no other."""
    seen = outcome(ranks, name)
    first = [s for s in seen if s["position"].is_last_stage and s["position"].tensor_parallel_rank == 0]
    ids = [i for s in first for i in s["selected"][0]]
    assert sorted(ids) == sorted(reference["selected"][0])


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_entropy_and_mismatch(outcome, reference, ranks, name):
    """To the last bits of fp32: a matrix product of other rows rounds differently, so packing moves single tokens."""
    for seen in outcome(ranks, name):
        got, want = seen["scores"][0], reference["scores"][0]
        assert got.num_action_tokens == want.num_action_tokens
        for field in ("entropy", "surprisal", "mismatch_mean", "mismatch_max", "mismatch_kl"):
            assert getattr(got, field) == pytest.approx(getattr(want, field), abs=2e-6)


@pytest.mark.parametrize(
    ("ranks", "name"), [case for case in LAYOUTS if case[1].endswith(", one sequence a micro-batch")]
)
def test_same_rows_give_the_same_bits(outcome, ranks, name):
    """When each micro-batch is the same wherever it runs, data and pipeline parallelism change no bit of a sum."""
    want = outcome(1, "one sequence a micro-batch")[0]["scores"][0]
    for seen in outcome(ranks, name):
        assert seen["scores"][0] == want


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_probe_after_two_steps(outcome, reference, ranks, name):
    for seen in outcome(ranks, name):
        np.testing.assert_allclose(seen["probe"], reference["probe"], atol=2e-4)


@pytest.fixture(scope="module")
def resumed(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    arguments = {
        "checkpoint": checkpoint,
        "folder": folder,
        "first": trainer(world_size=2, tensor_parallel=2),
        "second": trainer(world_size=2, pipeline_parallel=2),
    }
    return folder, launch("step_cases:resume", 2, arguments, timeout=300)


def test_saved_at_tp2_goes_on_at_pp2(resumed):
    for seen in resumed[1]:
        assert seen["step"] == 7
        np.testing.assert_allclose(seen["restored_probe"], seen["probe"], atol=2e-6)
        (went_on,), (resumed_stats,) = seen["went_on"], seen["resumed"]
        assert resumed_stats.loss == pytest.approx(went_on.loss, abs=1e-6)
        assert resumed_stats.grad_norm == pytest.approx(went_on.grad_norm, rel=1e-4)


def test_export_loads_in_transformers(resumed, checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    folder, seen = resumed
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    ids = torch.from_numpy(PROBE).long()[None]
    with torch.no_grad():
        logprob = torch.log_softmax(model(ids).logits[0].double(), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(seen[0]["probe"], logprob, atol=2e-5)
    before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert not torch.equal(before.model.norm.weight, model.model.norm.weight)
    assert [p.name for p in folder.iterdir() if "partial" in p.name] == []


def test_non_finite_values_stop_the_run_before_the_weights_change(checkpoint):
    (said,) = launch("step_cases:failures", 1, {"checkpoint": checkpoint}, timeout=200)
    assert "1 one under the policy or the engine" in said[0]
    assert said[1] == "optimizer step 1: the loss is nan; no weight was changed by this step"
