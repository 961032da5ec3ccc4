"""Real models on both sides of a push, and faults between them: each is caught, in float32 and in bfloat16, at the
first push and later; an honest pair is not. The engine computes attention by another kernel than the trainer, so that
the two round differently."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from stare_megatron.cluster.activity import ActivityLog
from stare_megatron.cluster.rank_costs import RankCosts
from stare_megatron.cluster.trainers import TrainerActor
from stare_megatron.config import SyncConfig
from stare_megatron.errors import RunError
from stare_megatron.run.weights import Weights
from stare_megatron.sync import check
from stare_megatron.sync.source import ParamSpec

TOKENS = np.random.default_rng(0).integers(3, 200, 48).astype(np.int32)
HEAD = 16
LAYER = "model.layers.1."
State = dict[str, torch.Tensor]


def model(dtype: torch.dtype, attention: str) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # as spread as those of a trained model
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return made.to(dtype)


@torch.no_grad()
def logprobs(policy: Qwen2ForCausalLM) -> np.ndarray[Any, np.dtype[np.float32]]:
    ids = torch.from_numpy(TOKENS).long()[None]
    scores = policy(ids).logits[0].float().log_softmax(-1)
    return scores[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()


class Pair:
    """A trainer and an engine. `arrives`: what the engine has of what it is sent, given what it had before; `reports`:
    whether it reports what it has, or what it was sent (the fault is in how it computes)."""

    def __init__(self, dtype: str, baseline: float = 0.0, **sync: Any) -> None:
        kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        self.ours, self.theirs = model(kind, "sdpa"), model(kind, "eager")
        self.arrives: Callable[[State, State], State] = lambda sent, before: sent
        self.reports = True
        self.passes: list[str] = []
        trainers = SimpleNamespace(
            push=self._push,
            score_tokens=lambda tokens: logprobs(self.ours),
            checksums=lambda: self._note("trainer") or self._sums(self.ours.state_dict()),
        )
        engines = SimpleNamespace(
            logprobs=lambda tokens: {0: logprobs(self.theirs)},
            checksums=self._engine_sums,
            awaiting_weights=lambda: [0],
            pushed=lambda *_: None,
            any_lost=lambda _: False,
        )
        self.weights = Weights(SyncConfig(**sync), dtype, trainers, engines, lambda: TOKENS)
        self.weights.baseline = baseline

    def learn(self, amount: float) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.ours.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=amount)

    def run(self, version: int) -> float:
        self.weights.push(version)
        return self.weights.probe(version, self.weights.score_probe(version))

    def _push(self, version: int, engines: list[int], sums: str) -> dict[str, str]:
        self.passes.append(sums)
        sent = {name: tensor.clone() for name, tensor in self.ours.state_dict().items()}
        self.has = self.arrives(sent, copy.deepcopy(self.theirs.state_dict()))
        self.theirs.load_state_dict({name: self.has.get(name, torch.zeros_like(t)) for name, t in sent.items()})
        self.sent = sent
        return {} if sums == "none" else self._sums(sent)

    def _engine_sums(self, names: Any = ()) -> dict[int, dict[str, str]]:
        found = self._sums(self.has if self.reports else self.sent)
        return {0: {name: value for name, value in found.items() if not names or name in names}}

    def _sums(self, state: State) -> dict[str, str]:
        return {name: check.checksum(tensor) for name, tensor in state.items()}

    def _note(self, what: str) -> None:
        self.passes.append(what)


def swapped_heads(sent: State, before: State) -> State:
    weight = sent[LAYER + "self_attn.q_proj.weight"].clone()
    weight[: 2 * HEAD] = weight[: 2 * HEAD].roll(HEAD, 0)
    return sent | {LAYER + "self_attn.q_proj.weight": weight}


def stale_layer(sent: State, before: State) -> State:
    return sent | {name: before[name] for name in sent if name.startswith(LAYER)}


def stale_engine(sent: State, before: State) -> State:
    return before


def missing_bias(sent: State, before: State) -> State:
    return {name: tensor for name, tensor in sent.items() if name != LAYER + "self_attn.v_proj.bias"}


def stale_row(sent: State, before: State) -> State:
    """Of a token that the prompt lacks: as an expert's matrix, it changes nothing that the probe sees."""
    name = "model.embed_tokens.weight"
    weight = sent[name].clone()
    weight[0] = before[name][0]
    return sent | {name: weight}


FAULTS = {f.__name__: f for f in (swapped_heads, stale_layer, stale_engine, missing_bias, stale_row)}


@pytest.mark.parametrize("first", [True, False], ids=["first push", "later"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fault_ends_the_run_and_names_the_parameter(dtype, fault, first):
    pair = Pair(dtype)
    if not first:
        pair.run(0)
    # A step of training moves log-probs by less than bfloat16 does; float32 sees a larger one.
    pair.learn(3e-4 if dtype == "bfloat16" else 3e-2)
    pair.arrives = FAULTS[fault]
    with pytest.raises(RunError, match=r"engine 0 .* version 1.*'model\."):
        pair.run(1)
    if fault == "stale_row" or (dtype == "bfloat16" and fault.startswith("stale")):
        assert check.compare(logprobs(pair.theirs), logprobs(pair.ours)).mean < check.BOUNDS[dtype]


def other_positions(engine: Qwen2ForCausalLM) -> None:
    engine.model.rotary_emb.inv_freq.mul_(0.5)


def other_epsilon(engine: Qwen2ForCausalLM) -> None:
    for module in engine.modules():
        if "RMSNorm" in type(module).__name__:
            module.variance_epsilon = 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [other_positions, other_epsilon])
def test_the_same_weights_computed_with_otherwise_end_the_run(dtype, fault):
    pair = Pair(dtype)
    fault(pair.theirs)
    with pytest.raises(RunError, match="compute differently with the same weights"):
        pair.run(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_in_another_order_than_it_is_computed_in_ends_the_run(dtype):
    """Then checksums agree: the engine has what the trainer exports."""
    pair = Pair(dtype)
    pair.arrives, pair.reports = swapped_heads, False
    with pytest.raises(RunError, match="compute differently with the same weights"):
        pair.run(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_honest_pair_trains_on(dtype):
    pair = Pair(dtype)
    for version in range(4):
        found = pair.run(version)
        assert found <= check.BOUNDS[dtype] / 2
        pair.learn(3e-3)
    assert pair.passes == ["all", "share", "share", "share"]
    assert (pair.weights.baseline > 0) == (dtype != "float32")


def test_bfloat16_needs_more_room_than_float32_has():
    """What made the two defaults exclude each other."""
    assert Pair("bfloat16").run(0) > check.BOUNDS["float32"]


def test_the_baseline_is_measured_once_and_moves_only_where_checksums_agree():
    pair = Pair("bfloat16")
    first = pair.run(0)
    assert pair.weights.baseline == first
    pair.weights.baseline = 1e-6  # as if it had been much nearer
    floor = check.BOUNDS["bfloat16"] / 10
    other = pair.run(1)
    moved = other > check.expected("bfloat16", 1e-6)
    assert moved == (other > 3e-6 + floor)
    assert pair.weights.baseline == (other if moved else 1e-6)
    assert ("trainer" in pair.passes) == moved


def test_a_resumed_run_has_its_baseline_and_compares_all_weights_once():
    pair = Pair("bfloat16", baseline=0.02)
    pair.run(7)
    pair.run(8)
    assert pair.passes == ["all", "share"]
    assert pair.weights.baseline == 0.02


def test_an_explicit_threshold_is_what_it_says():
    pair = Pair("bfloat16", probe_threshold=1e-3)
    with pytest.raises(RunError, match=r"> 0\.001 \(sync\.probe_threshold\); the checksums of all parameters agree"):
        pair.run(0)
    loose = Pair("bfloat16", probe_threshold=50.0)
    loose.run(0)
    assert (loose.passes, loose.weights.baseline) == (["none"], 0.0)


def test_what_is_not_probed_is_not_summed():
    pair = Pair("bfloat16", probe_every=2)
    for version in range(1, 5):
        pair.run(version)
    assert pair.passes == ["none", "all", "none", "share"]


def test_every_parameter_has_its_turn(monkeypatch):
    specs = [ParamSpec(str(n), torch.bfloat16, (n,)) for n in (3, 5, 9, 1, 2, 6)]
    assert check.share(specs, 7) == {spec.name for spec in specs}
    monkeypatch.setattr(check, "_SHARE", 8)
    turns = [check.share(specs, version) for version in range(4)]
    assert turns == [{"3", "5"}, {"9"}, {"1", "2"}, {"6"}]
    assert check.share(specs, 4) == turns[0]


def test_on_cpus_turns_are_shorter():
    layer = "model.layers.0."
    names = [layer + "norm", *(layer + f"mlp.experts.{i}.up_proj.weight" for i in range(9)), layer + "mlp.gate.weight"]
    specs = [ParamSpec(name, torch.bfloat16, (1 << 24,)) for name in names]
    assert check.share(specs, 0) == {*names}
    assert [check.share(specs, turn, on_cpu=True) for turn in range(6)] == [
        {*names[i : i + 2]} for i in range(0, 12, 2)
    ]


def test_an_expert_that_no_worker_has_is_named():
    """Where an engine tells others of the layer: one whose experts are quantized tells of none."""
    ours = {f"layers.{n}.mlp.experts.{i}.up_proj.weight": "1" for n in range(2) for i in range(3)} | {"norm": "1"}
    left_out = "layers.1.mlp.experts.2.up_proj.weight"
    theirs = {name: value for name, value in ours.items() if name != left_out}
    assert check.first_difference(ours, theirs) == left_out
    assert check.first_difference(ours, ours) is None
    assert check.first_difference(ours, {n: v for n, v in ours.items() if not n.startswith("layers.1.")}) is None


def test_a_rank_takes_turns_by_probes_and_not_by_versions(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(check, "share", lambda specs, turn, *, on_cpu: asked.append(turn) or frozenset())
    rank: Any = object.__new__(TrainerActor.__ray_metadata__.modified_class)
    rank._config = SimpleNamespace(sync=SyncConfig(probe_every=4))
    rank._stream, rank._found, rank._sharded = SimpleNamespace(specs=()), {}, None
    rank._activity = ActivityLog()
    rank._pusher, rank._costs = SimpleNamespace(push=lambda version: 0), RankCosts(1)
    for version in range(4, 17, 4):
        rank.push(version, "share")
    assert asked == [1, 2, 3, 4]


def test_a_head_that_left_its_embedding_is_reported_whatever_was_asked_for(monkeypatch):
    """The trainer has no such parameter, so it can ask for none."""
    worker = pytest.importorskip("stare_megatron.sync.worker")
    rows = torch.arange(6.0).reshape(3, 2)
    head = worker.Piece("lm_head.weight", rows, 0, 0, 2, 0, stray=True)
    parts = [worker.Piece("a.weight", rows, 0, 0, 2, 0), worker.Piece("b.weight", rows, 0, 0, 2, 0), head]
    monkeypatch.setattr(worker, "pieces", lambda model, packed, experts: iter(parts))
    monkeypatch.setattr(worker, "get_world_group", lambda: SimpleNamespace(world_size=1, cpu_group=None))
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda out, mine, group: out.__setitem__(0, mine))
    extension = worker.ChecksumExtension()
    extension.model_runner = SimpleNamespace(get_model=lambda: SimpleNamespace(packed_modules_mapping={}))
    found = extension.stare_checksums(["a.weight"])
    assert found.keys() == {"a.weight", "lm_head.weight"}
    assert check.first_difference({"a.weight": found["a.weight"]}, found) == "lm_head.weight"
