"""Tokens by the age of their policy: what is selected and measured of each age."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.selection import NEGATIVE, POSITIVE
from stare_megatron.algo.stare import ScoredCandidates, Weights
from stare_megatron.config import AlgorithmConfig, CorrectionConfig
from stare_megatron.trainer.ages import Ages, ages, measure, weigh_by_age
from stare_megatron.types import Control

N, OLDEST = 3000, 3
CONFIG = AlgorithmConfig.model_validate(
    {"method": "stare", "stare": {"variant": "C2", "fraction": 0.1, "weight_pos": 3.0, "weight_neg": 0.25}}
)


def tokens(age_T: torch.Tensor) -> ScoredCandidates:
    """Surprisal grows with age, as that of a policy which has moved on does."""
    made = torch.Generator().manual_seed(5)
    surprisal_T = torch.rand(N, generator=made) + 0.5 * age_T
    advantage_T = torch.randn(N, generator=made)
    action_T = torch.rand(N, generator=made) < 0.8
    zeros = torch.zeros(N)
    return ScoredCandidates(surprisal_T, advantage_T, action_T, torch.arange(N), zeros, zeros)


def weigh(part: Any) -> Weights:
    return ALGORITHMS["stare"].weigh(part, Control(True, 3.0, 0.25, 0.2, 0.3), CONFIG, OneRank())


def test_each_age_is_selected_from_by_its_own_quantile():
    age_T = torch.arange(N) % (OLDEST + 1)
    known = tokens(age_T)
    got = weigh_by_age(known, Ages(age_T, OLDEST), weigh)
    want = 0
    for age in range(OLDEST + 1):
        for code, weight in ((POSITIVE, 3.0), (NEGATIVE, 0.25)):
            sign = 1 if code == POSITIVE else -1
            here = known.action_T & (sign * known.advantage_T > 0) & (age_T == age)
            k = math.ceil(0.1 * int(here.sum()) - 1e-9)
            best = torch.where(here, known.surprisal_T, -1.0).topk(k).indices
            assert got.selection.selected_T[best].all()
            assert (got.weight_T[best] == weight).all()
            assert (got.subset_T[here] == code).all()
            want += k
    assert int(got.selection.selected_T.sum()) == want == int(got.selection.selected_S.sum())
    assert int(got.selection.count_S.sum()) == int((got.subset_T < 2).sum())
    assert ((got.weight_T != 1) == got.selection.selected_T).all()
    # One quantile of all would take the oldest almost alone.
    whole = weigh(known).selection.selected_T
    share = (whole & (age_T == OLDEST)).sum() / whole.sum()
    assert share > 0.9


def test_tokens_of_one_age_are_weighed_as_ever():
    age_T = torch.zeros(N, dtype=torch.int64)
    known = tokens(age_T)
    got, want = weigh_by_age(known, Ages(age_T, 2), weigh), weigh(known)
    assert torch.equal(got.weight_T, want.weight_T)
    assert torch.equal(got.subset_T, want.subset_T)
    assert torch.equal(got.selection.selected_T, want.selection.selected_T)
    assert torch.equal(got.selection.count_S, want.selection.count_S)


def test_what_sets_its_weight_chooses_alike_by_age_and_at_once():
    """By the sign of each token's own sensitivity: `trainer.step.weigh` need not look at ages."""
    config = AlgorithmConfig.model_validate({"method": "stare", "stare": {"weight": "auto", "variant": "C2"}})

    def auto(part: Any) -> Weights:
        return ALGORITHMS["stare"].weigh(part, Control(True, 3.0, 0.25, 0.2, 0.3), config, OneRank())

    age_T = torch.arange(N) % (OLDEST + 1)
    sensitivity_T = torch.randn(N, generator=torch.Generator().manual_seed(6))
    known = dataclasses.replace(tokens(age_T), sensitivity_T=sensitivity_T)
    got, want = weigh_by_age(known, Ages(age_T, OLDEST), auto), auto(known)
    assert torch.equal(got.weight_T, want.weight_T)
    assert torch.equal(got.selection.selected_T, want.selection.selected_T)
    assert torch.equal(got.selection.count_S, want.selection.count_S)
    assert torch.equal(got.selection.selected_S, want.selection.selected_S)
    assert int(want.selection.selected_T.sum()) > N / 4


def data() -> Any:
    """Seven tokens: a prompt's, and drawn by versions 4, 4, 3, 3, 1, 1, of which the last is another rank's."""
    batch = SimpleNamespace(
        action_T=torch.tensor([0, 1, 1, 1, 1, 1, 1]).bool(),
        version_T=torch.tensor([-1, 4, 4, 3, 3, 1, 1]),
        rollout_logprob_T=torch.tensor([0.0, -1, -1, -1, -1, -1, -1]),
        advantage_T=torch.tensor([0.0, 1, 1, -1, 0, 1, 1]),
        sequence_T=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        global_sequence_N=torch.tensor([0, 1]),
    )
    return SimpleNamespace(batch=batch, owned_T=torch.tensor([0, 1, 1, 1, 1, 1, 0]).bool())


RUNNER: Any = SimpleNamespace(is_last_stage=True, comm=OneRank(), from_last_stage=lambda x: x, context_comm=OneRank())
SCORED: Any = SimpleNamespace(
    scores=SimpleNamespace(entropy_T=torch.tensor([9.0, 1, 2, 3, 4, 5, 6])),
    raw_logprob_T=torch.tensor([9.0, -1, -1.5, -2, -2, -4, -9]),  # less than the engine's: 0, 0.5, 1, 1, 3, 8
)


def test_what_is_measured_of_each_age():
    selected = [torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool()]
    of = ages([data()], version=4, oldest=OLDEST)
    assert of.age_T.tolist() == [0, 0, 0, 1, 1, 3, 3]
    mask = CorrectionConfig(mode="mask", low=0.5)
    measured = measure(RUNNER, [data()], [SCORED], selected, of, mask)
    found = {part.name: (part.total, part.weight) for part in measured if not part.name.endswith("ess")}
    assert found == {
        "age/0/tokens": (2, 1),
        "age/0/entropy": (3.0, 2),
        "age/0/mismatch": (0.5, 2),
        "age/0/bounded": (0, 2),
        "age/0/selected": (1, 2),
        "age/1/tokens": (2, 1),
        "age/1/entropy": (7.0, 2),
        "age/1/mismatch": (2.0, 2),
        "age/1/bounded": (2, 2),
        "age/1/selected": (1, 1),
        "age/3/tokens": (1, 1),
        "age/3/entropy": (5.0, 1),
        "age/3/mismatch": (3.0, 1),
        "age/3/bounded": (1, 1),
        "age/3/selected": (0, 1),
    }
    effective = {part.name: part.total for part in measured if part.name.endswith("ess")}
    unequal = (1 + math.exp(-0.5)) ** 2 / (2 * (1 + math.exp(-1)))
    assert effective == pytest.approx(
        {"age/0/ess": unequal, "age/1/ess": 1, "age/3/ess": 1}, rel=1e-4
    )  # of squares in fixed point


def test_what_is_rejected_by_whole_sequences_is_counted_so():
    """The first's ratio is e^-1.5, at its third token; the second's e^-4 of those counted here."""
    of = ages([data()], version=4, oldest=OLDEST)
    mask = CorrectionConfig(mode="mask", level="sequence", low=math.exp(-2))
    measured = measure(RUNNER, [data()], [SCORED], [torch.zeros(7).bool()], of, mask)
    found = {part.name: part.total for part in measured if part.name.endswith("bounded")}
    assert found == {"age/0/bounded": 0, "age/1/bounded": 1, "age/3/bounded": 1}


@pytest.mark.parametrize("version", [4, 9])
def test_nothing_is_measured_where_nobody_samples_ahead(version):
    of = ages([data()], version, oldest=0)
    assert not of.age_T.any()
    assert measure(RUNNER, [data()], [SCORED], [torch.zeros(7).bool()], of, CorrectionConfig()) == ()
