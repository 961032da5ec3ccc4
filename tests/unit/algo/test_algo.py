"""Advantages, surrogate, reductions, controller and token weights: recorded cases and properties."""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from stare_megatron.algo import controller
from stare_megatron.algo.advantages import group_relative
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.controller import ControllerState
from stare_megatron.algo.reduce import fixed_point_sum, from_fixed_point, token_factors
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.selection import NEGATIVE, POSITIVE
from stare_megatron.algo.stare import ScoredCandidates
from stare_megatron.algo.surrogate import clipped_surrogate, importance_ratio, kl_estimate
from stare_megatron.config import AlgorithmConfig, StareConfig
from stare_megatron.errors import RunError
from stare_megatron.types import Control, EntropyReading

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "data" / "golden"


def _tool():
    spec = importlib.util.spec_from_file_location("check_golden", ROOT / "tools" / "check_golden.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_golden = _tool()
CASES = [
    pytest.param(file.stem, i, id=f"{file.stem}-{i}")
    for file in sorted(GOLDEN.glob("*.json"))
    for i in range(len(json.loads(file.read_text())))
]


@pytest.mark.parametrize(("method", "index"), CASES)
def test_recorded_case(method, index):
    case = json.loads((GOLDEN / f"{method}.json").read_text())[index]
    assert check_golden.CHECKS[method](case) == []


def test_check_golden_sees_a_wrong_number_and_an_unknown_method(tmp_path):
    cases = json.loads((GOLDEN / "stare.json").read_text())[:2]
    cases[1]["expected"]["loss"] += 2e-9
    (tmp_path / "stare.json").write_text(json.dumps(cases))
    (tmp_path / "no_such_method.json").write_text("[]")
    passed, failures = check_golden.run(tmp_path)
    assert passed == 1
    assert [f.partition(":")[0] for f in failures] == ["no_such_method.json", "stare.json[1]"]


def test_equal_rewards_have_no_advantage_and_no_sign():
    assert group_relative([0.1] * 3, normalize_std=True) == (0.0, 0.0, 0.0)  # fsum / 3 is not 0.1


def test_ratio_is_finite_however_far_the_policies_are():
    logprob = torch.tensor([-1e4, 0.0], requires_grad=True)
    ratio = importance_ratio(logprob, torch.tensor([0.0, -1e4]))
    assert ratio.tolist() == pytest.approx([math.exp(-20), math.exp(20)])
    ratio.sum().backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [0.0, 0.0]


def test_clipped_tokens_are_those_without_a_gradient():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5, 11.0, 9.0], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    loss, clipped = clipped_surrogate(ratio, advantage, clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    loss.sum().backward()
    assert ratio.grad is not None
    assert clipped.tolist() == (ratio.grad == 0).tolist() == [False, False, True, True, False, False, True, False]
    assert loss.tolist() == pytest.approx([-0.5, -1.0, -1.28, 0.8, 1.0, 1.5, 10.0, 9.0])


def test_kl_estimate_is_exact_in_expectation():
    old, new = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    expected = (old * (old / new).log()).sum()
    assert float((old * kl_estimate(new.log(), old.log())).sum()) == pytest.approx(float(expected), abs=1e-15)


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum"])
def test_factors_sum_to_the_mean_however_tokens_are_split(reduction):
    lengths = [3, 1, 4]
    loss = torch.arange(8, dtype=torch.float64) ** 2
    length_T = torch.tensor([n for n in lengths for _ in range(n)], dtype=torch.float64)
    parts = loss.split(lengths)
    want = {
        "token-mean": loss.mean(),
        "sequence-mean-token-mean": sum(p.mean() for p in parts) / 3,
        "sequence-mean-token-sum": loss.sum() / 3,
    }[reduction]
    factor = token_factors(reduction, length_T, num_action_tokens=8, num_sequences=3)
    halves = sum(float((factor[i::2] * loss[i::2]).sum()) for i in range(2))
    assert halves == pytest.approx(float(want), rel=1e-7)


def test_fixed_point_entropy_does_not_depend_on_order_or_sharding():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(3)) * 5
    whole = fixed_point_sum(x)
    shuffled = x[torch.randperm(10_000, generator=torch.Generator().manual_seed(4))]
    parts = sum(fixed_point_sum(p) for p in shuffled.split([1, 999, 0, 9000]))
    assert torch.equal(whole, parts)
    assert from_fixed_point(int(whole[0])) == pytest.approx(float(x.double().sum()), abs=10_000 * 2**-25)
    assert fixed_point_sum(torch.tensor([1.0, math.nan, math.inf])).tolist() == [1 << 24, 2]


STARE = AlgorithmConfig(stare=StareConfig(fraction=0.5, weight_pos=4.0, weight_neg=0.25, target_entropy=0.3))


def test_gate_is_strict_and_controller_state_round_trips():
    state = controller.initial(STARE)
    assert ControllerState.read(json.loads(json.dumps(dataclasses.asdict(state)))) == state
    assert not controller.observe(STARE, state, EntropyReading(1, 0.3))[1].gate_on
    assert controller.observe(STARE, state, EntropyReading(1, math.nextafter(0.3, 0)))[1].gate_on
    assert not ALGORITHMS["grpo"].controller(STARE, state, EntropyReading(1, 0.0))[1].gate_on


@pytest.mark.parametrize("method", ["grpo", "stare"])
@pytest.mark.parametrize("entropy", [math.nan, math.inf])
def test_a_non_finite_entropy_stops_the_run(method, entropy):
    with pytest.raises(RunError, match="mean entropy is"):
        ALGORITHMS[method].controller(STARE, controller.initial(STARE), EntropyReading(1, entropy))


def _tokens() -> ScoredCandidates:
    return ScoredCandidates(
        surprisal_T=torch.tensor([1.0, 2.0, 3.0, 9.0, 1.0, 2.0, 0.1, 9.0]),
        entropy_T=torch.tensor([0.5, 0.1, 2.0, 9.0, 0.3, 1.5, 0.0, 9.0]),
        sensitivity_T=torch.tensor([-0.3, -0.1, 0.1, -9.0, -0.1, 0.1, -0.2, -9.0]),
        advantage_T=torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0]),
        action_T=torch.tensor([True, True, True, False, True, True, True, True]),  # the 4th is tool output
        global_id_T=torch.arange(8),
    )


@pytest.mark.parametrize(
    ("variant", "gate_on", "want"),
    [
        ("O1", True, [1, 4, 4, 1, 1, 1, 1, 1]),
        ("C2", True, [1, 4, 4, 1, 0.25, 0.25, 1, 1]),
        ("C2", False, [1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_weights(variant, gate_on, want):
    config = STARE.model_copy(update={"stare": STARE.stare.model_copy(update={"variant": variant})})
    control = Control(gate_on, 4.0, 0.25, 0.2, 0.3)
    got = ALGORITHMS["stare"].weigh(_tokens(), control, config, OneRank())
    assert got.weight_T.tolist() == want
    assert got.selection.count_S.tolist() == [3, 3]
    assert got.selection.selected_S.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("selector", "plus", "minus"), [("surprisal", [2], [5]), ("relative", [1], [4]), ("sensitivity", [0], [6])]
)
def test_selectors(selector, plus, minus):
    """s - H is (0.5, 1.9, 1.0) in T+ and (0.7, 0.5, 0.1) in T-; S as above."""
    stare = STARE.stare.model_copy(update={"selector": selector, "fraction": 0.3})
    config = STARE.model_copy(update={"stare": stare})
    got = ALGORITHMS["stare"].weigh(_tokens(), Control(True, 4.0, 0.25, 0.2, 0.3), config, OneRank())
    assert got.selection.selected_T.nonzero()[:, 0].tolist() == plus + minus


@pytest.mark.parametrize(("variant", "minus"), [("O1", 1), ("C2", 0.25)])
def test_weights_that_set_themselves_are_of_all_tokens_that_can_raise_the_entropy(variant, minus):
    """S < 0 and an advantage; which of them is most critical does not matter, and P is not read."""
    stare = STARE.stare.model_copy(update={"weight": "auto", "variant": variant, "fraction": 0.01})
    config = STARE.model_copy(update={"stare": stare})
    tokens = _tokens()
    got = ALGORITHMS["stare"].weigh(tokens, Control(True, 4.0, 0.25, 0.2, 0.3), config, OneRank())
    assert got.weight_T.tolist() == [4, 4, 1, 1, minus, 1, minus, 1]
    assert got.selection.selected_T.nonzero()[:, 0].tolist() == [0, 1, 4, 6]
    assert (got.selection.count_S.tolist(), got.selection.selected_S.tolist()) == ([3, 3], [2, 2])
    broken = dataclasses.replace(tokens, sensitivity_T=torch.where(torch.arange(8) < 1, math.nan, tokens.sensitivity_T))
    left = ALGORITHMS["stare"].weigh(broken, Control(True, 4.0, 0.25, 0.2, 0.3), config, OneRank())
    assert left.weight_T.tolist() == [1, 4, 1, 1, minus, 1, minus, 1]
    assert (left.selection.count_S.tolist(), int(left.selection.nan)) == ([2, 3], 1)


def test_sensitivity_chooses_the_largest_predicted_entropy_changes():
    """dH = -eta A S: L+ are the tokens of T+ that raise the entropy most, L- those of T- that lower it most, for one
    |A|; so amplifying L+ and damping L- both raise it more than any other choice of as many tokens."""
    g = torch.Generator().manual_seed(0)
    n = 400
    advantage = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, -1.0)
    sensitivity = torch.randn(n, generator=g)
    noise = torch.rand(n, generator=g)
    everything = torch.ones(n, dtype=torch.bool)
    tokens = ScoredCandidates(noise, advantage, everything, torch.arange(n), noise, sensitivity)
    config = STARE.model_copy(update={"stare": STARE.stare.model_copy(update={"selector": "sensitivity"})})
    got = ALGORITHMS["stare"].weigh(tokens, Control(True, 4.0, 0.25, 0.2, 0.3), config, OneRank()).selection
    change = -advantage * sensitivity
    plus, minus = change[advantage > 0], change[advantage < 0]
    k_plus, k_minus = got.selected_S.tolist()
    chosen_plus = change[got.selected_T & (advantage > 0)]
    chosen_minus = change[got.selected_T & (advantage < 0)]
    assert torch.equal(chosen_plus.sort().values, plus.topk(k_plus).values.sort().values)
    assert torch.equal(chosen_minus.sort().values, minus.topk(k_minus, largest=False).values.sort().values)


def test_grpo_selects_nothing_but_counts_the_subsets():
    got = ALGORITHMS["grpo"].weigh(_tokens(), Control(True, 4.0, 0.25, 0.2, 0.3), STARE, OneRank())
    assert got.weight_T.tolist() == [1.0] * 8
    assert got.selection.count_S.tolist() == [3, 3]
    assert int(got.selection.selected_S.sum()) == int(got.selection.selected_T.sum()) == 0
    assert got.subset_T.tolist() == [POSITIVE] * 3 + [2] + [NEGATIVE] * 3 + [2]
