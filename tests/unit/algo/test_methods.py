"""The laboratory of methods: settings, what each loss and choice must do, and that sharding changes nothing."""

import dataclasses
import math
import pickle
import tomllib
from pathlib import Path

import pytest
import torch

from stare_megatron.algo import controller
from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.correction import correct
from stare_megatron.algo.covariance import share_of
from stare_megatron.algo.losses.dapo import shaped_reward
from stare_megatron.algo.losses.types import LossInputs, Sequences
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import ScoredCandidates
from stare_megatron.config import AlgorithmConfig, CorrectionConfig, parse
from stare_megatron.config.methods import METHODS
from stare_megatron.errors import UserError
from stare_megatron.run import preflight
from stare_megatron.types import Control, EntropyReading
from tests.configs import MINIMAL
from tests.guide import blocks
from tests.unit.algo.test_algo_selection import on_ranks

OPEN = Control(True, 1.5, 0.5, 0.2, 0.3, 0.004)
LENGTHS = [5, 9, 1, 12]
NUM = sum(LENGTHS)
SEQUENCE_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


def config(method, **settings):
    return AlgorithmConfig.model_validate({"method": method, **settings})


def column(seed, scale=1.0):
    return torch.randn(NUM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


ADVANTAGE_T = torch.tensor([0.8, -1.1, 0.0, 0.4], dtype=torch.float64)[SEQUENCE_T]
OLD_T = -column(1).abs()
ENTROPY_T = column(2).abs()


def candidates(rows=slice(None)):
    everything = torch.ones(NUM, dtype=torch.bool)
    ids = torch.arange(NUM) * 7
    return ScoredCandidates(*(x[rows] for x in (-OLD_T, ADVANTAGE_T, everything, ids, ENTROPY_T, column(4))))


def loss_of(method, settings, *, rows=slice(None), comm=None, logprob_T=None, entropy_T=None):
    """Per-token loss of some rows, with gradients to `logprob_T` and `entropy_T`."""
    comm = comm or OneRank()
    logprob_T = OLD_T + column(3, 0.3) if logprob_T is None else logprob_T
    weights = ALGORITHMS[method].weigh(candidates(rows), OPEN, settings, comm)
    inputs = LossInputs(
        logprob_T=logprob_T[rows],
        old_logprob_T=OLD_T[rows],
        entropy_T=(ENTROPY_T if entropy_T is None else entropy_T)[rows],
        advantage_T=ADVANTAGE_T[rows],
        weight_T=weights.weight_T,
        selected_T=weights.selection.selected_T,
        correction_T=torch.ones(NUM, dtype=torch.float64)[rows],
        sequences=Sequences(SEQUENCE_T[rows], len(LENGTHS), comm),
        control=OPEN,
    )
    return ALGORITHMS[method].loss(inputs, settings)


ROOT = Path(__file__).parents[3]


def test_every_method_has_a_file_and_a_page():
    files = {f.stem for f in (ROOT / "stare_megatron" / "algo" / "losses").glob("*.py")} - {"__init__", "types"}
    pages = {f.stem for f in (ROOT / "docs" / "algorithms").glob("*.md")} - {"README"}
    assert files == pages == METHODS.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_page_gives_every_setting_with_its_default(method):
    page = (ROOT / "docs" / "algorithms" / f"{method}.md").read_text()
    settings = config(method)
    wanted = {key: getattr(settings, key) for key in METHODS[method].uses}
    if method in AlgorithmConfig.model_fields:
        own = getattr(settings, method)
        wanted |= {f"{method}.{key}": getattr(own, key) for key in type(own).model_fields}
    for key, value in wanted.items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert f"| `{key}` | `{shown}` |" in page


def test_the_example_of_the_guide_works(tmp_path, monkeypatch):
    """The file and the table of docs/adding_a_method.md, taken from the page, are a method, in no file of the
    package."""
    page = blocks("adding_a_method")
    (tmp_path / "certainty.py").write_text(page["python"][0])
    monkeypatch.chdir(tmp_path)
    run = parse(MINIMAL | tomllib.loads(page["toml"][0]), "x.toml")
    address = f"{tmp_path}/certainty.py:CERTAINTY"
    assert run.algorithm.method == address
    assert (run.algorithm.clip_low, run.algorithm.clip_high) == (0.1, 0.2)
    method = ALGORITHMS[address]
    weights = method.weigh(candidates(), OPEN, run.algorithm, OneRank())
    assert torch.equal(weights.weight_T, torch.exp(-ENTROPY_T / 0.5))
    assert method.loss is ALGORITHMS["stare"].loss
    assert not run.algorithm.kind.seeks_target
    assert pickle.loads(pickle.dumps(run)) == run
    written = run.model_dump(mode="json")
    assert written["algorithm"]["settings"] == {"tau": 0.5}
    assert "dapo" not in written["algorithm"]
    assert parse(written, "again") == run

    for table, message in (
        ({"settings": {"tua": 1}}, "unknown key 'algorithm.settings.tua'; did you mean 'algorithm.settings.tau'"),
        ({"settings": {"tau": 0}}, "algorithm.settings.tau = 0: must be above 0.0"),
        ({"response_tokens": 9}, "response_tokens is not used by method"),
    ):
        with pytest.raises(UserError, match=message):
            parse(MINIMAL | {"algorithm": {"method": address} | table}, "x.toml")
    with pytest.raises(UserError, match="knows no entropy of a token before its update"):
        parse(MINIMAL | {"algorithm": {"method": address}, "trainer": {"scoring": "rollout"}}, "x.toml")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("M = 3", "is of type int, want Method"),
        ("from stare_megatron.config.methods import Method, uses\nM = Method(uses('reduction'))", "has no algorithm"),
        ("from stare_megatron.config.methods import Method, uses\nM = Method(uses('reduction'), algorithm=1)", None),
    ],
)
def test_a_method_of_another_kind_is_refused(tmp_path, code, message):
    (tmp_path / "own.py").write_text(code)
    tree = MINIMAL | {"algorithm": {"method": f"{tmp_path}/own.py:M"}}
    if message:
        with pytest.raises(UserError, match=message):
            parse(tree, "x.toml")
    else:
        with pytest.raises(UserError, match="its algorithm is of type int, want Algorithm"):
            preflight.check_method(parse(tree, "x.toml"))


@pytest.mark.parametrize("method", METHODS)
def test_context_sharding_changes_no_loss_and_no_gradient(method):
    settings = config(method)
    whole = (OLD_T + column(3, 0.3)).requires_grad_()
    loss_T = loss_of(method, settings, logprob_T=whole).loss_T
    loss_T.sum().backward()
    split = (OLD_T + column(3, 0.3)).requires_grad_()

    def body(rank, comm):
        rows = torch.arange(NUM)[rank::3]
        return rows, loss_of(method, settings, rows=rows, comm=comm, logprob_T=split).loss_T

    parts = on_ranks(3, body)
    torch.stack([part.sum() for _, part in parts]).sum().backward()
    for rows, part in parts:
        assert torch.allclose(part, loss_T[rows], rtol=1e-12, atol=1e-14)
    assert torch.allclose(split.grad, whole.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"w_reinforce"}))
def test_on_policy_without_selection_every_method_is_the_policy_gradient(method):
    """At r = 1 the summed gradient of log-prob is -A, apart from each method's own choice of tokens."""
    own = {
        "clip_cov": {"clip_cov": {"low": 1e6, "high": 2e6}},
        "kl_cov": {"kl_cov": {"coefficient": 0.0}},
        "entropy_advantage": {"entropy_advantage": {"alpha": 0.0}},
        "high_entropy_tokens": {"high_entropy_tokens": {"fraction": 1.0}},
        "stare": {"stare": {"variant": "O1"}},
    }
    logprob_T = OLD_T.clone().requires_grad_()
    settings = config(method, **own.get(method, {}))
    loss_of(method, settings, logprob_T=logprob_T).loss_T.sum().backward()
    weight_T = ALGORITHMS[method].weigh(candidates(), OPEN, settings, OneRank()).weight_T
    want_T = -ADVANTAGE_T * weight_T
    assert logprob_T.grad is not None
    # GMPO shares a gradient out over the sequence through 1 / (length + 1e-8)
    assert torch.allclose(logprob_T.grad, want_T, atol=1e-7)


def test_gmpo_is_the_gradient_of_the_geometric_mean():
    logprob_T = (OLD_T + column(3, 0.3)).requires_grad_()
    token_loss = loss_of("gmpo", config("gmpo"), logprob_T=logprob_T)
    lengths_T = torch.tensor(LENGTHS, dtype=torch.float64)[SEQUENCE_T]
    (token_loss.loss_T / lengths_T).sum().backward()
    direct_T = (OLD_T + column(3, 0.3)).requires_grad_()
    distance_T = direct_T - OLD_T
    clipped_T = torch.where(ADVANTAGE_T > 0, distance_T.clamp(max=0.4), distance_T.clamp(min=-0.4))
    ratios = [part.mean().exp() for part in clipped_T.split(LENGTHS)]
    loss = -sum(a[0] * r for a, r in zip(ADVANTAGE_T.split(LENGTHS), ratios, strict=True))
    loss.backward()
    assert torch.allclose(logprob_T.grad, direct_T.grad, atol=1e-7)
    assert float((token_loss.loss_T / lengths_T).detach().sum()) == pytest.approx(float(loss.detach()), abs=1e-7)


def covariances():
    return (ADVANTAGE_T - ADVANTAGE_T.mean()) * (OLD_T - OLD_T.mean())


def test_kl_cov_takes_the_largest_covariances_of_the_batch():
    settings = config("kl_cov", kl_cov={"fraction": 0.2})
    chosen = ALGORITHMS["kl_cov"].weigh(candidates(), OPEN, settings, OneRank()).selection.selected_T
    assert set(chosen.nonzero()[:, 0].tolist()) == set(covariances().topk(int(0.2 * NUM)).indices.tolist())


def test_clip_cov_draws_its_budget_from_the_band():
    settings = config("clip_cov", clip_cov={"fraction": 0.12, "low": 0.05, "high": 1.5})
    chosen = ALGORITHMS["clip_cov"].weigh(candidates(), OPEN, settings, OneRank()).selection.selected_T
    band = (covariances() > 0.05) & (covariances() < 1.5)
    assert int(chosen.sum()) == int(0.12 * NUM) < int(band.sum())
    assert bool((band | ~chosen).all())
    logprob_T = OLD_T.clone().requires_grad_()
    loss_of("clip_cov", settings, logprob_T=logprob_T).loss_T.sum().backward()
    assert (logprob_T.grad == 0).tolist() == (chosen | (ADVANTAGE_T == 0)).tolist()


def test_share_is_floored_exactly_and_never_none():
    assert share_of(0.07, torch.tensor([0, 1, 99, 100, 101])).tolist() == [1, 1, 6, 7, 7]
    assert 0.29 * 100 < 29  # the floating-point trap
    assert int(share_of(0.29, torch.tensor(100))) == 29


def test_high_entropy_tokens_keeps_the_top_fifth():
    weight_T = (
        ALGORITHMS["high_entropy_tokens"].weigh(candidates(), OPEN, config("high_entropy_tokens"), OneRank()).weight_T
    )
    k = math.ceil(NUM / 5)
    assert set(weight_T.nonzero()[:, 0].tolist()) == set(ENTROPY_T.topk(k).indices.tolist())


def test_entropy_advantage_adds_to_the_advantage_and_keeps_its_sign():
    settings = config("entropy_advantage")
    weight_T = ALGORITHMS["entropy_advantage"].weigh(candidates(), OPEN, settings, OneRank()).weight_T
    want_T = ADVANTAGE_T + torch.minimum(0.4 * ENTROPY_T, ADVANTAGE_T.abs() / 2.0)
    assert torch.allclose(ADVANTAGE_T * weight_T, want_T)
    assert weight_T.amin() >= 0.5


@pytest.mark.parametrize("method", ["entropy_bonus", "adaptive_entropy"])
def test_bonus_reaches_the_entropy(method):
    entropy_T = ENTROPY_T.clone().requires_grad_()
    settings = config(method, **({method: {"coefficient": 0.004}} if method == "entropy_bonus" else {}))
    loss_T = loss_of(method, settings, entropy_T=entropy_T).loss_T
    loss_T.sum().backward()
    assert ALGORITHMS[method].entropy_gradient
    assert entropy_T.grad is not None
    assert torch.equal(entropy_T.grad, torch.full_like(entropy_T, -0.004))


def test_adaptive_coefficient_moves_a_step_and_is_shut_above_the_target():
    settings = config("adaptive_entropy", adaptive_entropy={"target_entropy": 0.2, "step": 0.002, "maximum": 0.005})
    state, used = controller.initial(settings), []
    for entropy in (0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.2):
        state, control = ALGORITHMS["adaptive_entropy"].controller(settings, state, EntropyReading(1, entropy))
        used.append(control.entropy_coefficient)
    assert used == pytest.approx([0.0, 0.002, 0.004, 0.005, 0.0, 0.003, 0.005])
    assert controller.ControllerState.read(dataclasses.asdict(state)) == state


def test_overlong_reward_falls_over_the_buffer():
    settings = config("dapo", response_tokens=100, dapo={"overlong_share": 0.2, "overlong_penalty": 0.5})
    lengths = (80, 81, 90, 100, 130)
    assert [shaped_reward(Outcome(1.0, n), settings) for n in lengths] == pytest.approx([1.0, 0.975, 0.75, 0.5, 0.5])
    same = [Outcome(1.0, 10), Outcome(1.0, 95)]
    assert ALGORITHMS["dapo"].advantage(same, settings)[0] > 0 > ALGORITHMS["dapo"].advantage(same, settings)[1]


def test_w_reinforce_needs_no_group():
    outcomes = [Outcome(1.0, 5), Outcome(0.0, 5), Outcome(-1.0, 5)]
    assert ALGORITHMS["w_reinforce"].advantage(outcomes, config("w_reinforce")) == (0.1, -1.0, -1.0)


@pytest.mark.parametrize(
    ("entropy", "want"), [(0.4, (False, 1.5, 0.6)), (0.27, (True, 1.25, 0.8)), (0.1, (True, 1.5, 0.6))]
)
def test_proportional_controller(entropy, want):
    stare = {"weight_pos": 1.5, "weight_neg": 0.6, "target_entropy": 0.3, "controller": "proportional", "band": 0.2}
    settings = config("stare", stare=stare)
    state, control = ALGORITHMS["stare"].controller(settings, controller.initial(settings), EntropyReading(1, entropy))
    assert (control.gate_on, control.weight_pos, control.weight_neg) == pytest.approx(want)
    assert state == dataclasses.replace(controller.initial(settings), steps=1)


def test_defaults_are_the_methods():
    assert config("gspo").clip_high == 4e-4
    assert config("gspo").reduction == "sequence-mean-token-mean"
    assert not config("dr_grpo").normalize_std
    assert config("gspo", clip_high=1e-3).clip_high == 1e-3
    run = parse(MINIMAL | {"algorithm": {"method": "dr_grpo"}, "rollout": {"max_response_tokens": 77}}, "x.toml")
    assert run.algorithm.response_tokens == 77


@pytest.mark.parametrize("method", METHODS)
def test_written_configuration_can_be_read(method):
    run = parse(MINIMAL | {"algorithm": {"method": method}}, "x.toml")
    again = parse(run.model_dump(mode="json"), "x.toml")
    assert again.model_dump() == run.model_dump()


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"method": "gpso"}, r"method = 'gpso' is not registered .did you mean 'gspo'"),
        ({"method": "gspo", "dual_clip": 10.0}, r"dual_clip is not used by method 'gspo'"),
        ({"method": "dr_grpo", "normalize_std": True}, r"normalize_std is not used .*it is False there"),
        ({"method": "stare", "stare": {"band": 0.1}}, r"stare.band is for stare.controller"),
        ({"method": "stare", "stare": {"controller": "proportional", "adaptive": True}}, r"stare.adaptive is for"),
    ],
)
def test_settings_without_effect_are_refused(algorithm, message):
    with pytest.raises(UserError, match=message):
        parse(MINIMAL | {"algorithm": algorithm}, "x.toml")


def corrected(**settings):
    engine_T = OLD_T + column(5, 0.8)
    sequences = Sequences(SEQUENCE_T, len(LENGTHS), OneRank())
    return OLD_T - engine_T, correct(OLD_T, engine_T, sequences, CorrectionConfig(**settings))


def test_no_correction_is_one():
    _, got = corrected()
    assert got.factor_T.tolist() == [1.0] * NUM
    assert not got.bounded_T.any()


def test_truncated_ratio():
    x_T, got = corrected(mode="truncate", high=1.5)
    assert torch.allclose(got.factor_T, x_T.exp().clamp(max=1.5))
    assert 0 < int(got.bounded_T.sum()) < NUM
    assert got.bounded_T.tolist() == (x_T.exp() > 1.5).tolist()


@pytest.mark.parametrize(
    ("level", "low", "high"), [("token", 0.7, 1.6), ("sequence", 0.7, 1.6), ("sequence-mean", 0.9, 1.2)]
)
def test_masked_ratio(level, low, high):
    x_T, got = corrected(mode="mask", level=level, low=low, high=high)
    reduce = {"token": lambda x: x, "sequence": lambda x: x.sum() + 0 * x, "sequence-mean": lambda x: x.mean() + 0 * x}
    ratio_T = torch.cat([reduce[level](part) for part in x_T.split(LENGTHS)]).exp()
    inside_T = (ratio_T >= low) & (ratio_T <= high)
    assert 0 < int(inside_T.sum()) < NUM
    assert torch.allclose(got.factor_T, torch.where(inside_T, ratio_T, 0.0))
    assert got.bounded_T.tolist() == (~inside_T).tolist()


@pytest.mark.parametrize("level", ["sequence", "sequence-mean"])
def test_sequence_correction_does_not_depend_on_context_sharding(level):
    settings = CorrectionConfig(mode="truncate", level=level, high=1.2)
    engine_T = OLD_T + column(5, 0.8)
    whole_T = correct(OLD_T, engine_T, Sequences(SEQUENCE_T, 4, OneRank()), settings).factor_T

    def body(rank, comm):
        rows = torch.arange(NUM)[rank::2]
        return rows, correct(OLD_T[rows], engine_T[rows], Sequences(SEQUENCE_T[rows], 4, comm), settings).factor_T

    for rows, factor_T in on_ranks(2, body):
        assert torch.allclose(factor_T, whole_T[rows], rtol=1e-14)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"algorithm": {"correction": {"mode": "truncate", "low": 0.5}}}, r"correction.low = 0.5 is for"),
        ({"algorithm": {"correction": {"mode": "mask", "low": 3.0}}}, r"low 3.0 is not below"),
        ({"algorithm": {"correction": {"high": 3.0}}}, r"high and low are for correction.mode"),
        (
            {"algorithm": {"correction": {"mode": "mask"}}, "rollout": {"temperature": 0.9}},
            r"needs rollout.temperature",
        ),
    ],
)
def test_correction_that_could_not_be_right_is_refused(tree, message):
    with pytest.raises(UserError, match=message):
        parse(MINIMAL | tree, "x.toml")
