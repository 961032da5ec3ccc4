"""Scoring modes: what is refused at the door, what each method reads, and that equal scores give equal bits."""

import dataclasses

import pytest
import torch

from stare_megatron.algo import controller
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.reduce import fixed_point_sum, from_fixed_point
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import Candidates, ScoredCandidates
from stare_megatron.config import AlgorithmConfig, parse
from stare_megatron.config.methods import METHODS, SELECTORS
from stare_megatron.errors import UserError
from stare_megatron.types import Control, EntropyReading
from tests.configs import tables
from tests.unit.algo.test_algo_selection import on_ranks

TREE = tables(trainer={"scoring": "rollout"})
N = 400


def scored_tokens() -> ScoredCandidates:
    """Many equal surprisals, so that ties are broken; a fifth is no action."""
    g = torch.Generator().manual_seed(5)
    return ScoredCandidates(
        surprisal_T=(-torch.log(torch.rand(N, generator=g)) * 4).round() / 4,
        advantage_T=torch.randint(-2, 3, (N,), generator=g).float(),
        action_T=torch.rand(N, generator=g) < 0.8,
        global_id_T=torch.randperm(N, generator=g) * 3,
        entropy_T=torch.rand(N, generator=g),
        sensitivity_T=(torch.randn(N, generator=g) * 4).round() / 4,
    )


def part(tokens, rows):
    return type(tokens)(**{f.name: getattr(tokens, f.name)[rows] for f in dataclasses.fields(tokens)})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trainer": {"updates_per_batch": 2}}, r"trainer.updates_per_batch = 1, not 2: after the first update"),
        ({"rollout": {"temperature": 0.9}}, r"rollout.temperature = 1 and rollout.top_p = 1, not 0.9 and 1.0"),
        ({"rollout": {"top_p": 0.95}}, r"rollout.temperature = 1 and rollout.top_p = 1, not 1.0 and 0.95"),
        ({"algorithm": {"method": "high_entropy_tokens"}}, r"no entropy .*algorithm.method = 'high_entropy_tokens'"),
        (
            {"algorithm": {"method": "entropy_advantage"}},
            r"no entropy .*'entropy_advantage' needs; use trainer.scoring",
        ),
        ({"algorithm": {"stare": {"selector": "relative"}}}, r"no entropy .*algorithm.stare.selector = 'relative'"),
        ({"algorithm": {"stare": {"selector": "sensitivity"}}}, r"no sensitivity .*selector = 'sensitivity'"),
    ],
)
def test_what_the_rollout_does_not_know_is_refused(tree, message):
    tables = {name: TREE.get(name, {}) | table for name, table in tree.items()}
    with pytest.raises(UserError, match=message) as e:
        parse(TREE | tables, "x.toml")
    assert str(e.value).startswith('x.toml: trainer.scoring = "rollout" ')
    assert "\n" not in str(e.value)
    trainer = tables.get("trainer", {}) | {"scoring": "trainer"}
    assert parse(TREE | tables | {"trainer": trainer}, "x.toml").trainer.scoring == "trainer"


def test_a_micro_batch_may_be_chosen_by_anything():
    """It is weighed in the update pass, which knows entropy and sensitivity."""
    stare = {"selector": "sensitivity", "scope": "microbatch"}
    assert parse(TREE | {"algorithm": {"stare": stare}}, "x.toml").algorithm.stare.selector == "sensitivity"


def weigh(settings: AlgorithmConfig, tokens: Candidates):
    return ALGORITHMS[settings.method].weigh(tokens, Control(True, 1.5, 0.5, 0.2, 0.3), settings, OneRank())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_registry_says_what_a_method_reads(method, selector):
    """Without scores a method works exactly when nothing is declared, and gives what it gives with them."""
    settings = AlgorithmConfig.model_validate({"method": method, "stare": {"selector": selector}})
    tokens = scored_tokens()
    sampled = Candidates(*(getattr(tokens, f.name) for f in dataclasses.fields(Candidates)))
    if SELECTORS[selector] if method == "stare" else METHODS[method].reads:
        with pytest.raises(TypeError, match="there was no scoring pass"):
            weigh(settings, sampled)
    else:
        got, want = weigh(settings, sampled), weigh(settings, tokens)
        assert torch.equal(got.weight_T, want.weight_T)
        assert torch.equal(got.selection.selected_T, want.selection.selected_T)


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.reads])
def test_what_is_declared_is_read(method):
    settings, tokens = AlgorithmConfig.model_validate({"method": method}), scored_tokens()
    for name in METHODS[method].reads:
        other = dataclasses.replace(tokens, **{f"{name}_T": getattr(tokens, f"{name}_T").flip(0)})
        assert not torch.equal(weigh(settings, tokens).weight_T, weigh(settings, other).weight_T)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_scores_give_equal_bits_at_any_order_and_sharding(selector, ranks, seed):
    """Entropy, gate, adapted weights and the weight of every token, over shards of any order and uneven length.

    The target is the mean entropy's neighbour in floating point, so that any other rounding would shut the gate.
    """
    tokens = scored_tokens()
    stare = {"variant": "C2", "selector": selector, "fraction": 0.07, "adaptive": True, "weight_pos": 1.2}

    def step(here, comm, target):
        settings = AlgorithmConfig.model_validate({"method": "stare", "stare": stare | {"target_entropy": target}})
        sums = torch.cat([fixed_point_sum(here.entropy_T[here.action_T]), here.action_T.sum()[None]])
        total, _, count = comm.sum(sums).tolist()
        entropy = from_fixed_point(total) / count
        state, control = ALGORITHMS["stare"].controller(
            settings, controller.initial(settings), EntropyReading(1, entropy)
        )
        weights = ALGORITHMS["stare"].weigh(here, control, settings, comm)
        by_id = dict(zip(here.global_id_T.tolist(), weights.weight_T.tolist(), strict=True))
        return entropy, state, control, by_id

    entropy = step(tokens, OneRank(), 1.0)[0]
    target = float(torch.nextafter(torch.tensor(entropy, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)))
    want = step(tokens, OneRank(), target)
    assert want[2].gate_on
    assert len(set(want[3].values())) == 3
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    bounds = [N * r * r // ranks**2 for r in range(ranks + 1)]
    results = on_ranks(ranks, lambda r, s: step(part(tokens, order[bounds[r] : bounds[r + 1]]), s, target))
    assert all(r[:3] == want[:3] for r in results)
    assert {i: w for r in results for i, w in r[3].items()} == want[3]
