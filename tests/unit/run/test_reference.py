"""A reference policy at the door: what is refused of it, what it takes, and that a run goes on with the same one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import checkpoint, tasks
from stare_megatron.checkpoint import settings
from stare_megatron.config import Config
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.errors import UserError
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.hardware import CONSTANTS, GPUS
from stare_megatron.plan.lengths import Lengths
from stare_megatron.plan.memory import Phase, RankInput, largest_pack, rank_parts, residency
from stare_megatron.plan.moves import host_memory, moves
from stare_megatron.plan.timing import Machine, Ranks
from stare_megatron.run import preflight, sizing
from stare_megatron.run.reference import check_reference, check_reference_tokenizer
from stare_megatron.tasks.tiny_model import make_tokenizer
from tests.configs import configuration, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = small_model(tmp_path_factory.mktemp("model") / "policy")
    make_tokenizer(tasks.get("order_free_sum")).save_pretrained(folder)
    return folder


@pytest.fixture
def other(model, tmp_path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "other"))


def make(model: Path, **kl: Any) -> Config:
    return configuration(model={"path": str(model)}, algorithm={"method": "grpo", "kl": {"coefficient": 0.1} | kl})


def refused(config: Config, *words: str) -> None:
    with pytest.raises(UserError) as e:
        check_reference(config, read_hf_config(config.model.path))
    assert all(word in str(e.value) for word in ("algorithm.kl.reference", *words)), e.value


def test_a_reference_like_the_policy_is_taken(model, other):
    config = make(model, reference=str(other))
    check_reference(config, read_hf_config(model))
    check_reference_tokenizer(config, load_tokenizer(model))
    preflight.check_reference(make(model), read_hf_config(model))


def test_a_reference_of_another_model_is_refused(model, other):
    refused(make(model, reference=str(other / "nowhere")), "no config.json")
    tree = json.loads((other / "config.json").read_text())
    for change, word in (
        ({"vocab_size": tree["vocab_size"] * 2}, "vocab is"),
        ({"rope_theta": 7.0}, "rope_theta is 7"),
    ):
        (other / "config.json").write_text(json.dumps(tree | change))
        refused(make(model, reference=str(other)), word, "model.path")
    (other / "config.json").write_text(json.dumps(tree))
    (other / "tokenizer.json").unlink()
    refused(make(model, reference=str(other)), "no tokenizer")


def test_a_reference_without_a_coefficient_is_not_looked_at(model, tmp_path):
    config = make(model, coefficient=0.0, reference=str(tmp_path / "nowhere"))
    check_reference(config, read_hf_config(model))
    assert checkpoint.settings_of(config).reference == {}


def test_another_tokenizer_is_refused(model, other):
    file = other / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    plain = [token for token in vocabulary if len(token) == 1][:2]
    vocabulary[plain[0]], vocabulary[plain[1]] = vocabulary[plain[1]], vocabulary[plain[0]]
    file.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"2 tokens have another id"):
        check_reference_tokenizer(make(model, reference=str(other)), load_tokenizer(model))


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"method": "grpo", "kl": {"coefficient": 0.1, "estimator": "k1"}}, 'set kl.estimator = "k2"'),
        ({"method": "w_reinforce", "kl": {"coefficient": 0.1, "place": "reward"}}, "no more of a reward than its sign"),
        ({"method": "grpo", "kl": {"coefficient": -0.1}}, "must be at least 0"),
    ],
)
def test_settings_that_cannot_be_meant(algorithm, words):
    with pytest.raises(UserError, match=words):
        configuration(algorithm=algorithm)
    configuration(algorithm={"method": "w_reinforce", "kl": {"coefficient": 0.1}})


def test_an_estimator_that_is_no_reward_is_noted(model):
    (note,) = preflight.check_method(make(model, place="reward"))
    assert "k1 has the reverse KL's" in note
    assert preflight.check_method(make(model, place="reward", estimator="k1")) == ()


def test_a_reference_is_counted_where_it_is(model):
    shape, off = read_hf_config(model), make(model, coefficient=0.0)
    host, device = make(model), make(model, residency="device")
    size = sizing.class_bytes(off, shape)["parameters"]
    assert sizing.arena_bytes(host, shape) - sizing.arena_bytes(off, shape) == size > 0
    assert sizing.arena_bytes(device, shape) == sizing.arena_bytes(off, shape)
    for of in (sizing.rank_bytes, sizing.resident_bytes):
        assert of(device, shape) - of(off, shape) == size
        assert of(host, shape) == of(off, shape)


def test_the_plan_counts_its_memory_its_moves_and_its_pass(model):
    shape, off = read_hf_config(model), make(model, coefficient=0.0)
    host, device = make(model), make(model, residency="device")
    machine = Machine(GPUS["h100"], CONSTANTS, Layers.ENGINE)
    size = sizing.class_bytes(off, shape)["parameters"]
    kept = host_memory(host, shape, machine).arenas - host_memory(off, shape, machine).arenas
    assert kept == size * host.trainer.world_size
    assert moves(host, shape, machine).score * 64e9 * 0.4 == pytest.approx(4 * size)
    assert moves(device, shape, machine).seconds == moves(off, shape, machine).seconds == 0
    lengths = Lengths(8, (20, 40, 60), "made up")
    passes = {name: Ranks(c, shape, machine, lengths).score() for name, c in (("on", host), ("off", off))}
    assert passes["on"].seconds == pytest.approx(2 * passes["off"].seconds)
    assert passes["on"].flops == pytest.approx(2 * passes["off"].flops)
    given = RankInput(Layers.ENGINE, largest_pack(device, lengths), 1, residency(device))
    parts = [rank_parts(c, shape, given, Phase.ROLLOUT, 0) for c in (device, host)]
    assert [part.get("reference", 0) for part in parts] == [size, 0]


def test_a_run_goes_on_with_the_reference_it_was_held_to(model, other, tmp_path):
    config = make(model, reference=str(other))
    then = checkpoint.settings_of(config)
    assert list(then.reference) == ["model.safetensors"]
    saved = tmp_path / "saved"
    saved.mkdir()
    settings.write(saved, then)
    moved = Path(shutil.copytree(other, tmp_path / "moved"))
    checkpoint.check_settings(saved, checkpoint.settings_of(make(model, reference=str(moved))), [])
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    now = checkpoint.settings_of(make(model, reference=str(moved)))
    with pytest.raises(UserError, match=r"another reference policy: model\.safetensors differ"):
        checkpoint.check_settings(saved, now, [])
    checkpoint.check_settings(saved, now, ["algorithm.kl.reference"])
