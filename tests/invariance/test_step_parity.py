"""One fixed batch under every layout: the same losses, gradient norms, entropies and chosen tokens.

Not exercised here: Transformer Engine, NCCL, bf16, experts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import launch
from step_cases import PROBE, decisions, make_checkpoint, quadrants, transformers_step

STARE = {"variant": "C2", "fraction": 0.1, "target_entropy": 9.0}


OTHER_ORDER = {"batch": {"order": 3}}


def trainer(**settings: Any) -> dict[str, Any]:
    return {"trainer": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}} | settings}


def settings(ranks: int, **extra: Any) -> dict[str, Any]:
    """`extra`: tables, or keys of [trainer]."""
    tables = {name: value for name, value in extra.items() if isinstance(value, dict)}
    keys = {name: value for name, value in extra.items() if not isinstance(value, dict)}
    return trainer(world_size=ranks, **keys) | tables


LAYOUT_CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "reference": trainer(),
        "one sequence a micro-batch": trainer(micro_batch_tokens=1),
        "one micro-batch": trainer(micro_batch_tokens=100_000),
        "no distributed optimizer": trainer(distributed_optimizer=False),
        "full recompute": trainer(recompute="full"),
        "logits in chunks": trainer(logits_chunk_tokens=7),
        "other order": trainer() | OTHER_ORDER,
        "other order, one sequence a micro-batch": trainer(micro_batch_tokens=1) | OTHER_ORDER,
    },
    2: {
        "TP2": trainer(world_size=2, tensor_parallel=2),
        "TP2 SP": trainer(world_size=2, tensor_parallel=2, sequence_parallel=True),
        "TP2 SP, logits in chunks": trainer(
            world_size=2, tensor_parallel=2, sequence_parallel=True, logits_chunk_tokens=7
        ),
        "PP2": trainer(world_size=2, pipeline_parallel=2),
        "PP2 VPP2": trainer(world_size=2, pipeline_parallel=2, virtual_pipeline=2),
        "DP2": trainer(world_size=2),
        "DP2, one sequence a micro-batch": trainer(world_size=2, micro_batch_tokens=1),
        "PP2, one sequence a micro-batch": trainer(world_size=2, pipeline_parallel=2, micro_batch_tokens=1),
        "CP2": trainer(world_size=2, context_parallel=2),
        "DP2, other order": trainer(world_size=2) | OTHER_ORDER,
        "CP2, other order": trainer(world_size=2, context_parallel=2) | OTHER_ORDER,
    },
    4: {
        "DP2 CP2, other order": trainer(world_size=4, context_parallel=2) | OTHER_ORDER,
        "TP2 PP2": trainer(world_size=4, tensor_parallel=2, pipeline_parallel=2),
        "DP4, one sequence a micro-batch": trainer(world_size=4, micro_batch_tokens=1),
    },
}
# Settings under which one process and two data-parallel ranks must agree with each other.
SETTINGS: dict[str, dict[str, Any]] = {
    "two steps a batch": {"updates_per_batch": 2},
    "temperature 0.7": {"rollout": {"temperature": 0.7}},
    "sequence-mean-token-mean": {"algorithm": {"method": "stare", "reduction": "sequence-mean-token-mean"}},
    "sequence-mean-token-sum": {"algorithm": {"method": "grpo", "reduction": "sequence-mean-token-sum"}},
}
CASES = {
    ranks: cases | {name: settings(ranks, **extra) for name, extra in SETTINGS.items() if ranks <= 2}
    for ranks, cases in LAYOUT_CASES.items()
}
CASES[1]["microbatch scope, one micro-batch"] = trainer(micro_batch_tokens=100_000) | {
    "algorithm": {"method": "stare", "stare": STARE | {"scope": "microbatch"}}
}
CASES[1]["microbatch scope"] = trainer() | {"algorithm": {"method": "stare", "stare": STARE | {"scope": "microbatch"}}}
LAYOUTS = [(ranks, name) for ranks, cases in LAYOUT_CASES.items() for name in cases if name != "reference"]


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
            done[ranks] = launch("step_cases:many", ranks, arguments)
        return [by_case[name] for by_case in done[ranks]]

    return of


@pytest.fixture(scope="module")
def reference(outcome) -> dict[str, Any]:
    return outcome(1, "reference")[0]


def test_reference_is_a_real_step(reference):
    first, second = reference["stats"]
    assert (
        first["update/ratio_max"] == 1.0
    )  # on-policy: the update's log-probs are those of the scoring pass, to the bit
    assert (first["update/clip_fraction"], first["update/kl"]) == (0.0, 0.0)
    assert (
        first["stare/tokens_pos"] + first["stare/tokens_neg"] < reference["scores"][0].num_action_tokens
    )  # some groups have no advantage
    assert first["stare/selected_pos"] == -(-first["stare/tokens_pos"] // 10)
    assert first["stare/selected_neg"] == -(-first["stare/tokens_neg"] // 10)
    assert first["update/grad_norm"] > 0.1
    assert second["update/loss"] != first["update/loss"]


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_loss_and_gradient_norm(outcome, reference, ranks, name):
    for seen in outcome(ranks, name):
        for got, want in zip(seen["stats"], reference["stats"], strict=True):
            assert got["update/loss"] == pytest.approx(want["update/loss"], abs=1e-5)
            assert got["update/grad_norm"] == pytest.approx(want["update/grad_norm"], rel=1e-4)
            assert got["update/lr"] == want["update/lr"]
            counts = ("stare/tokens_pos", "stare/tokens_neg", "stare/selected_pos", "stare/selected_neg")
            assert [got[c] for c in counts] == [want[c] for c in counts]


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_gradient_of_every_parameter(outcome, reference, ranks, name):
    """Of the first step; whole, by Hugging Face name."""
    want, got = reference["gradient"], outcome(ranks, name)[0]["gradient"]
    assert got.keys() == want.keys()
    for parameter, values in want.items():
        assert float((got[parameter] - values).abs().max()) < 1e-5, parameter


def test_gradient_is_the_one_whose_norm_is_reported(outcome, reference):
    for seen in (reference, outcome(2, "DP2")[0], outcome(2, "TP2")[0], outcome(2, "PP2 VPP2")[0]):
        squares = sum(float(values.double().square().sum()) for values in seen["gradient"].values())
        assert squares**0.5 == pytest.approx(seen["stats"][0]["update/grad_norm"], rel=1e-5)
        assert max(float(values.abs().max()) for values in seen["gradient"].values()) > 1e-2


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_gate_and_controller(outcome, reference, ranks, name):
    """Decisions and adapted weights are equal when the target is no nearer to the entropy than its rounding, 2e-6."""
    entropies = [s.entropy for s in reference["readings"]]
    for gap in (-1e-5, 1e-5):
        target = entropies[0] + gap
        assert abs(target - entropies[1]) > 2e-6
        for seen in outcome(ranks, name):
            assert decisions(target, [s.entropy for s in seen["readings"]]) == decisions(target, entropies)


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
        for field in ("policy/entropy", "policy/surprisal", "mismatch/mean", "mismatch/max", "mismatch/kl"):
            assert got[field] == pytest.approx(want[field], abs=2e-6)


@pytest.mark.parametrize(("ranks", "name"), LAYOUTS)
def test_entropy_dynamics(outcome, reference, ranks, name):
    """Of the first step; S is known to rounding, so a token next to its critical surprisal may change sides."""
    want = reference["stats"][0]
    assert want["throughput/trained_tokens"] == reference["scores"][0].num_action_tokens
    assert 0 < want["dynamics/overlap"] < 1
    assert min(quadrants(want, "tokens")) > 0
    assert [x > 0 for x in quadrants(want, "change")] == [False, True, True, False]
    for seen in outcome(ranks, name):
        got = seen["stats"][0]
        assert got["throughput/trained_tokens"] == want["throughput/trained_tokens"]
        assert got["dynamics/non_finite"] == 0
        assert np.abs(np.subtract(quadrants(got, "tokens"), quadrants(want, "tokens"))).max() <= 1
        assert quadrants(got, "change") == pytest.approx(quadrants(want, "change"), abs=1e-4)
        for name, error in (("predicted_change_unweighted", 1e-4), ("critical_surprisal", 1e-2)):
            sums = (s.part(f"dynamics/{name}").total for s in (got, want))
            assert next(sums) == pytest.approx(next(sums), abs=error)
        assert got.part("dynamics/overlap") == want.part("dynamics/overlap")


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


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_on_two_ranks(outcome, name):
    (alone,), both = outcome(1, name), outcome(2, name)
    for seen in both:
        assert len(seen["stats"]) == (4 if name == "two steps a batch" else 2)
        for got, want in zip(seen["stats"], alone["stats"], strict=True):
            assert got["update/loss"] == pytest.approx(want["update/loss"], abs=1e-5)
            assert got["update/grad_norm"] == pytest.approx(want["update/grad_norm"], rel=1e-4)
            assert got["update/kl"] == pytest.approx(want["update/kl"], abs=1e-5)
            assert got["stare/selected_pos"] == want["stare/selected_pos"]


def test_second_step_of_a_batch_is_off_policy_with_one_selection(outcome, reference):
    first, second, *_ = outcome(1, "two steps a batch")[0]["stats"]
    assert (first["update/kl"], first["update/ratio_max"]) == (0.0, 1.0)
    assert second["update/kl"] > 0
    assert second["update/ratio_max"] > 1
    whole = reference["stats"][0]
    assert first["stare/selected_pos"] + second["stare/selected_pos"] == whole["stare/selected_pos"]
    assert first["stare/tokens_neg"] + second["stare/tokens_neg"] == whole["stare/tokens_neg"]


def test_temperature_scores_the_policy_but_not_the_mismatch(outcome, reference):
    """Engines record log-probs at temperature 1, so that is where they are compared."""
    got, want = outcome(1, "temperature 0.7")[0]["scores"][0], reference["scores"][0]
    for field in ("mismatch/mean", "mismatch/max", "mismatch/kl"):
        assert got[field] == pytest.approx(want[field], abs=2e-6)
    assert got["policy/entropy"] < want["policy/entropy"] - 0.05


def test_microbatch_scope_is_the_batch_scope_of_a_single_micro_batch(outcome, reference):
    """On-policy the current log-probs are the scoring pass's; with several micro-batches each selects its own."""
    (got,), (several,) = outcome(1, "microbatch scope, one micro-batch"), outcome(1, "microbatch scope")
    want = reference["stats"][0]
    assert got["stats"][0]["update/loss"] == pytest.approx(want["update/loss"], abs=1e-6)
    assert got["stats"][0]["stare/selected_neg"] == want["stare/selected_neg"]
    assert quadrants(got["stats"][0], "change") == pytest.approx(quadrants(want, "change"), abs=1e-4)
    assert got["stats"][0].part("dynamics/overlap").total == want.part("dynamics/overlap").total
    assert several["stats"][0]["stare/tokens_neg"] == want["stare/tokens_neg"]
    assert several["stats"][0]["stare/selected_neg"] > want["stare/selected_neg"]  # a ceil for each micro-batch
    assert several["stats"][0]["update/loss"] != pytest.approx(want["update/loss"], abs=1e-4)


def test_first_step_against_transformers(checkpoint, reference):
    """Entropy, objective and gradient norm by the equations, one sequence at a time, in transformers."""
    want = transformers_step(checkpoint)
    scores, stats = reference["scores"][0], reference["stats"][0]
    assert scores.num_action_tokens == want["tokens"]
    assert scores["policy/entropy"] == pytest.approx(want["entropy"], abs=2e-6)
    assert scores["policy/surprisal"] == pytest.approx(want["surprisal"], abs=2e-6)
    assert scores["mismatch/mean"] == pytest.approx(want["mismatch"], abs=2e-6)
    assert (stats["stare/selected_pos"], stats["stare/selected_neg"]) == want["selected"]
    assert stats["update/loss"] == pytest.approx(want["loss"], abs=1e-5)
    assert stats["update/grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


@pytest.fixture(scope="module")
def resumed(checkpoint, tmp_path_factory):
    """Saved under one layout, resumed under another; by name."""
    layouts = {
        "TP2 to PP2": (trainer(world_size=2, tensor_parallel=2), trainer(world_size=2, pipeline_parallel=2)),
        # One layer a chunk: the tied embedding's bucket follows a padded one (patches/bucket_padding.py).
        "VPP2 to DP2": (
            trainer(world_size=2, pipeline_parallel=2, virtual_pipeline=2),
            trainer(world_size=2),
        ),
    }
    folder = tmp_path_factory.mktemp("saved")
    arguments = {"checkpoint": checkpoint, "folder": folder, "layouts": layouts}
    return folder, launch("step_cases:resume", 2, arguments)


@pytest.mark.parametrize("name", ["TP2 to PP2", "VPP2 to DP2"])
def test_saved_at_one_layout_goes_on_at_another(resumed, name):
    for by_name in resumed[1]:
        seen = by_name[name]
        assert seen["step"] == 7
        np.testing.assert_allclose(seen["restored_probe"], seen["probe"], atol=2e-6)
        (went_on,), (resumed_stats,) = seen["went_on"], seen["resumed"]
        assert resumed_stats["update/loss"] == pytest.approx(went_on["update/loss"], abs=1e-6)
        assert resumed_stats["update/grad_norm"] == pytest.approx(went_on["update/grad_norm"], rel=1e-4)


def test_export_loads_in_transformers(resumed, checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    folder, by_rank = resumed
    name = "TP2 to PP2"
    folder, seen = folder / name, by_rank[0][name]
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    ids = torch.from_numpy(PROBE).long()[None]
    with torch.no_grad():
        logprob = torch.log_softmax(model(ids).logits[0].double(), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(seen["probe"], logprob, atol=2e-5)
    before = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert not torch.equal(before.model.norm.weight, model.model.norm.weight)
    assert [p.name for p in folder.iterdir() if "partial" in p.name] == []


def test_non_finite_values_stop_the_run_before_the_weights_change(checkpoint):
    (said,) = launch("step_cases:failures", 1, {"checkpoint": checkpoint})
    assert "1 one under the policy or the engine" in said[0]
    assert said[1] == "optimizer step 1: the loss is nan; no weight was changed by this step"
