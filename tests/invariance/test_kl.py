"""KL to a reference policy on ranks: Hugging Face's values and gradients, any layout the same, nothing of the policy
changed by the reference's pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch
from step_cases import first_tokens, make_checkpoint, make_groups

from tests.invariance.kl_cases import without_reward

BFLOAT16 = {"dtype": "bfloat16"}
COEFFICIENT = 0.3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reference") / "qwen2", seed=7)


def case(kl: dict[str, Any], *, model: dict[str, str] | None = None, **trainer: Any) -> dict[str, dict[str, Any]]:
    fixed = {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}}
    method = {"method": "grpo", "kl": {"coefficient": COEFFICIENT} | kl}
    return {"model": model or {}, "algorithm": method, "trainer": fixed | trainer}


def kinds(reference: Path, **trainer: Any) -> dict[str, dict[str, Any]]:
    folder = {"reference": str(reference)}
    return {
        "k2": case(folder | {"estimator": "k2"}, **trainer),
        "k3": case(folder, **trainer),
        "reward": case(folder | {"place": "reward", "estimator": "k1", "residency": "device"}, **trainer),
    }


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2 VPP2": {"pipeline_parallel": 2, "virtual_pipeline": 2},
    "CP2": {"context_parallel": 2},
    "DP2": {},
    "DP2 offload": {"offload": ["gradients", "optimizer", "parameters"]},
}


@pytest.fixture(scope="module")
def one(checkpoint, reference) -> dict[str, dict[str, Any]]:
    cases = kinds(reference) | {"begin": case({}), "off": case({"coefficient": 0.0})}
    return launch("kl_cases:alone", 1, {"checkpoint": checkpoint, "cases": cases})[0]


@pytest.fixture(scope="module")
def two(checkpoint, reference) -> list[dict[str, dict[str, Any]]]:
    cases = {
        f"{layout}: {kind}": overrides
        for layout, keys in LAYOUTS.items()
        for kind, overrides in kinds(reference, world_size=2, **keys).items()
    }
    return launch("kl_cases:alone", 2, {"checkpoint": checkpoint, "cases": cases})


def logprobs(folder: Path, *, grad: bool = False) -> tuple[Any, dict[tuple[str, int], torch.Tensor]]:
    """Hugging Face's model, and its log-probs of the action tokens of each trajectory with loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {}
    with torch.set_grad_enabled(grad):
        for group in make_groups():
            for trajectory in group.trajectories:
                if (group.prompt.id, trajectory.sample) not in first_tokens(make_groups()):
                    continue
                ids = torch.from_numpy(trajectory.token_ids().astype(np.int64))
                table = model(ids[None]).logits[0, :-1].log_softmax(1)
                action = torch.from_numpy(trajectory.action_mask())[1:]
                found[group.prompt.id, trajectory.sample] = table.gather(1, ids[1:, None])[:, 0][action]
    return model, found


@pytest.fixture(scope="module")
def upstream(checkpoint, reference) -> tuple[Any, Any, Any]:
    model, policy = logprobs(checkpoint, grad=True)
    return model, policy, logprobs(reference)[1]


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_loss_and_gradient_are_those_of_hugging_face(one, upstream, kind):
    model, policy, reference = upstream
    d_T = torch.cat([policy[key] - reference[key] for key in policy])
    k3 = (torch.exp(-d_T) - 1 + d_T).mean()
    loss = COEFFICIENT * (d_T.square().mean() / 2 if kind == "k2" else k3)
    model.zero_grad()
    loss.backward(retain_graph=True)
    got = one[kind]
    assert got["stats"]["kl/reference"] == pytest.approx(k3.item(), rel=1e-4)
    assert got["stats"]["kl/penalty"] == pytest.approx(loss.item(), rel=1e-4)
    assert got["stats"]["update/loss"] == pytest.approx(loss.item(), rel=1e-4)
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert want.keys() <= got["gradient"].keys()
    scale = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(got["gradient"][name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=name)


def test_in_the_reward_advantages_are_of_rewards_less_the_kl_of_the_response(one, upstream):
    from stare_megatron.algo.advantages import group_relative

    _, policy, reference = upstream
    groups, starts = without_reward(make_groups()), first_tokens(make_groups())
    for group in groups:
        counted = [t for t in group.trajectories if t.status.is_trainable]
        keys = [(group.prompt.id, t.sample) for t in counted]
        sums = [float((policy[key] - reference[key]).detach().sum()) if key in policy else 0.0 for key in keys]
        want = group_relative([1.0 - COEFFICIENT * total for total in sums], normalize_std=True)
        for trajectory, key, advantage in zip(counted, keys, want, strict=True):
            action = np.flatnonzero(trajectory.action_mask())
            got = [one["reward"]["advantages"][starts[key] + int(i)] for i in action] if key in starts else []
            assert got == pytest.approx([advantage] * len(got), abs=1e-3)


@pytest.mark.parametrize("kind", ["k2", "k3", "reward"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(one, two, layout, kind):
    want = one[kind]
    for by_case in two:
        got = by_case[f"{layout}: {kind}"]
        for name in ("kl/reference", "kl/penalty", "update/loss", "update/grad_norm"):
            assert got["stats"][name] == pytest.approx(want["stats"][name], rel=1e-4, abs=1e-6)
        scale = max(float(g.abs().max()) for g in want["gradient"].values())
        for name, gradient in want["gradient"].items():
            torch.testing.assert_close(got["gradient"][name], gradient, atol=1e-3 * scale, rtol=1e-3, msg=name)


def test_the_reference_is_what_the_run_begins_with(one):
    assert one["begin"]["stats"]["kl/reference"] == pytest.approx(0.0, abs=1e-9)
    assert one["begin"]["stats"]["update/grad_norm"] < 1e-5


def test_without_a_coefficient_there_is_nothing_of_it(one):
    assert not [part.name for part in one["off"]["stats"].measured if part.name.startswith("kl/")]


def test_twenty_passes_change_no_bit_of_what_learns(checkpoint, reference):
    away = ["gradients", "optimizer", "parameters"]
    cases = {
        "bfloat16": case({}, model=BFLOAT16),
        "float32 on the device": case({"residency": "device", "reference": str(reference)}),
        "float16, all away": case({"reference": str(reference)}, model={"dtype": "float16"}, offload=away),
        "bfloat16 in the reward": case({"place": "reward", "estimator": "k3"}, model=BFLOAT16, offload=away),
    }
    (found,) = launch("kl_cases:cycles", 1, {"checkpoint": checkpoint, "cases": cases, "count": 20})
    assert found == dict.fromkeys(cases, True)


def test_a_resumed_run_learns_the_same(checkpoint, tmp_path):
    """The reference is read again from where it was; the policy is the checkpoint's."""
    layouts = {
        "loss": (case({"estimator": "k2"}, model=BFLOAT16), case({"estimator": "k2"}, model=BFLOAT16)),
        "reward": (case({"place": "reward", "estimator": "k1"}), case({"place": "reward", "estimator": "k1"})),
    }
    arguments = {"checkpoint": checkpoint, "folder": tmp_path, "layouts": layouts}
    (found,) = launch("step_cases:resume", 1, arguments)
    for seen in found.values():
        assert seen["resumed"] == seen["went_on"]
        assert seen["went_on"][0]["kl/reference"] > 0


def test_sampling_alone_tells_the_policy(checkpoint, reference):
    """`scoring = "rollout"`: the reference's pass is the only one before the update."""
    cases = kinds(reference, scoring="rollout")
    (found,) = launch("kl_cases:alone", 1, {"checkpoint": checkpoint, "cases": cases})
    for kind, seen in found.items():
        assert seen["stats"]["kl/reference"] > 0.1
        assert seen["stats"]["update/grad_norm"] > 0, kind
