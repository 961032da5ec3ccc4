"""What a pass measures is the same however its tokens are spread over micro-batches and ranks."""

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.losses.types import Reported
from stare_megatron.trainer.tally import Tally
from stare_megatron.types import Measured
from tests.unit.algo.test_algo_selection import on_ranks
from tests.unit.trainer.passes import N, run_pass, tokens

CLIP_COV = {"clip_cov": {"fraction": 0.2, "low": 0.0}, "clip_high": 0.05}
WHOLE = [list(range(N))]
SPREADS = {
    "two micro-batches, one of them empty": [[list(range(N)), []]],
    "two ranks": [[list(range(0, N, 2))], [list(range(1, N, 2))]],
    "one rank without tokens": [[list(range(20)), list(range(20, N))], [[], []]],
    "three ranks, uneven": [[list(range(7)), []], [[], list(range(7, 50))], [list(range(50, N)), []]],
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("method", "settings"), [("clip_cov", CLIP_COV), ("kl_cov", {"kl_cov": {"fraction": 0.2}})])
def test_spreading_changes_nothing(spread, method, settings):
    want = run_pass(method, settings, WHOLE)
    shares = SPREADS[spread]
    for seen in on_ranks(len(shares), lambda rank, comm: run_pass(method, settings, shares[rank], comm).measured):
        assert [(m.name, m.weight) for m in seen] == [(m.name, m.weight) for m in want.measured]
        assert [m.total for m in seen] == pytest.approx([m.total for m in want.measured], rel=1e-6, abs=1e-7)


def test_values_of_a_pass():
    """By the definitions, from the tokens themselves."""
    got, known = run_pass("clip_cov", CLIP_COV, WHOLE), tokens()
    ratio_T = (known["new"] - known["old"]).exp()
    clipped_T = (known["advantage"] > 0) & (ratio_T > 1.05)
    detached = got.part("loss/detached")
    assert 0 < detached.total < detached.weight == N
    assert got.part("update/clip_fraction") == Measured(
        "update/clip_fraction", int(clipped_T.sum()) + detached.total, N
    )
    assert got["update/ratio_max"] == pytest.approx(float(ratio_T.max()))
    assert got.part("stare/tokens_pos") == Measured("stare/tokens_pos", int((known["advantage"] > 0).sum()))
    assert type(got.part("stare/tokens_pos").total) is int
    assert got["stare/selected_pos"] + got["stare/selected_neg"] == int(0.2 * N)
    assert got["correction/mean"] == 1.0


def test_kinds():
    class Rank:
        is_last_stage, comm = True, OneRank()

        def object_from_last_stage(self, x):
            return x

    tally, x = Tally(torch.device("cpu")), torch.tensor([-3.0, -1.0])
    for values in (x, x[:0], x[:1]):
        tally.add(
            {
                "b": Reported(values, "max"),
                "c": Reported(values),
                "a": Reported(values < -2, "count"),
                "d": Reported(values, "sum"),
            }
        )
    assert tally.measured(Rank()) == (
        Measured("a", 2),
        Measured("c", -7.0, 3),
        Measured("d", -7.0),
        Measured("b", -1.0),
    )


@pytest.mark.parametrize(
    "second", [{"loss/other": Reported(torch.ones(2))}, {"loss/mine": Reported(torch.ones(2), "sum")}]
)
def test_names_that_change_are_a_bug(second):
    tally = Tally(torch.device("cpu"))
    tally.add({"loss/mine": Reported(torch.ones(2))})
    with pytest.raises(ValueError, match=r"the same metrics for every micro-batch; it changed .*loss/mine"):
        tally.add(second)
