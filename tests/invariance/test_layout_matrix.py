"""The whole product of layouts, micro-batch budgets and orders, on one fixed batch of mixed lengths with tool-output
holes. `test_step_parity.py` holds the core of it that every run of the suite checks.

Layouts of up to eight processes: TP {1, 2} x PP {1, 2, 2 with virtual stages} x DP {1, 2, 4} x CP {1, 2}.
"""

import itertools
from typing import Any

import pytest
from launch import launch
from step_cases import decisions, make_checkpoint

BUDGETS = {"one sequence a micro-batch": 1, "some": 64, "all": 100_000}
ORDERS = {"order as sampled": None, "other order": 3}
PIPELINES = {"PP1": (1, 1), "PP2": (2, 1), "PP2 VPP2": (2, 2)}
MOST_PROCESSES = 8


def matrix() -> dict[int, dict[str, dict[str, Any]]]:
    """Cases by number of processes."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for tp, pipeline, dp, cp in itertools.product((1, 2), PIPELINES, (1, 2, 4), (1, 2)):
        pp, vpp = PIPELINES[pipeline]
        ranks = tp * pp * dp * cp
        if ranks > MOST_PROCESSES:
            continue
        shape = {
            "world_size": ranks,
            "tensor_parallel": tp,
            "pipeline_parallel": pp,
            "virtual_pipeline": vpp,
            "context_parallel": cp,
        }
        for budget, order in itertools.product(BUDGETS, ORDERS):
            trainer = shape | {"micro_batch_tokens": BUDGETS[budget], "optimizer": {"lr": 1e-3}}
            batch = {"count": 1, "order": ORDERS[order]}
            name = f"TP{tp} {pipeline} DP{dp} CP{cp}, {budget}, {order}"
            found.setdefault(ranks, {})[name] = {"trainer": trainer, "batch": batch}
    return found


MATRIX = matrix()
REFERENCE = "TP1 PP1 DP1 CP1, some, order as sampled"
ROW_BY_ROW = "TP1 PP1 DP1 CP1, one sequence a micro-batch, order as sampled"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def alone(checkpoint) -> dict[str, dict[str, Any]]:
    return launch("step_cases:many", 1, {"checkpoint": checkpoint, "cases": MATRIX[1]})[0]


def compare(name: str, by_rank: list[dict[str, Any]], alone: dict[str, dict[str, Any]]) -> None:
    want, rows = alone[REFERENCE], alone[ROW_BY_ROW]
    entropy = want["readings"][0].entropy
    last = [s for s in by_rank if s["position"].is_last_stage and s["position"].tensor_parallel_rank == 0]
    assert sorted(i for s in last for i in s["selected"][0]) == sorted(want["selected"][0]), name
    for seen in by_rank:
        reading, stats, wanted = seen["readings"][0], seen["stats"][0], want["stats"][0]
        assert reading.num_action_tokens == want["readings"][0].num_action_tokens, name
        assert reading.entropy == pytest.approx(entropy, abs=2e-6), name
        for target in (entropy - 1e-5, entropy + 1e-5):
            assert decisions(target, [reading.entropy]) == decisions(target, [entropy]), name
        if name.startswith("TP1") and "CP1, one sequence" in name:
            assert seen["scores"] == rows["scores"], name  # equal micro-batches: equal to the bit
        assert stats["update/loss"] == pytest.approx(wanted["update/loss"], abs=1e-5), name
        assert stats["update/grad_norm"] == pytest.approx(wanted["update/grad_norm"], rel=1e-4), name
        counts = ("stare/tokens_pos", "stare/tokens_neg", "stare/selected_pos", "stare/selected_neg")
        assert [stats[c] for c in counts] == [wanted[c] for c in counts], name
    for parameter, values in want["gradient"].items():
        worst = float((by_rank[0]["gradient"][parameter] - values).abs().max())
        assert worst < 1e-5, f"{name}: {parameter}: {worst}"


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("ranks", MATRIX)
def test_every_layout_budget_and_order(checkpoint, alone, ranks):
    if ranks == 1:
        results = [alone]
    else:
        arguments = {"checkpoint": checkpoint, "cases": MATRIX[ranks]}
        results = launch("step_cases:many", ranks, arguments, timeout=3900)
    assert len(MATRIX[ranks]) == {1: 6, 2: 30, 4: 60, 8: 66}[ranks]
    for name in MATRIX[ranks]:
        compare(name, [by_case[name] for by_case in results], alone)
