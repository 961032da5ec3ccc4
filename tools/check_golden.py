"""Run recorded cases of the STARE reference implementation through the package's own functions.

    python tools/check_golden.py DIR

DIR holds one JSON file a method: a list of cases (float64). Loss cases hold `config`, `loss_agg_mode`, `inputs` [B, T]
and `expected` (`loss`, `grad_log_prob`, for STARE the token `weights`); `grpo_advantage` and `controller` have formats
of their own. Prints one line a failed case and ends with "N passed, M failed"; exit code 1 if any failed. A file no
method here answers to counts as one failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stare_megatron.algo import controller
from stare_megatron.algo.advantages import group_relative
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.controller import ControllerState
from stare_megatron.algo.losses.types import LossInputs, Sequences
from stare_megatron.algo.reduce import Reduction, token_factors
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import Candidates
from stare_megatron.config import AlgorithmConfig, StareConfig
from stare_megatron.config.methods import METHODS
from stare_megatron.types import Control, EntropyReading

TOLERANCE = 1e-9
REDUCTIONS: dict[str, Reduction] = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "sequence-mean-token-mean",
    "seq-mean-token-sum": "sequence-mean-token-sum",
}
Case = dict[str, Any]


def _far(name: str, got: Any, want: Any) -> list[str]:
    difference = (torch.as_tensor(got, dtype=torch.float64) - torch.as_tensor(want, dtype=torch.float64)).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    return [] if worst <= TOLERANCE else [f"{name} off by {worst:.3g}"]


def _algorithm_config(method: str, case: Case) -> AlgorithmConfig:
    settings = case["config"]
    common = {
        "clip_low": settings["clip_ratio_low"],
        "clip_high": settings["clip_ratio_high"],
        "dual_clip": settings["clip_ratio_c"],
        "reduction": REDUCTIONS[case["loss_agg_mode"]],
    }
    tree: dict[str, Any] = {key: value for key, value in common.items() if key in METHODS[method].uses}
    recorded = settings.get("policy_loss", {})
    if method == "clip_cov":
        names = {"clip_cov_ratio": "fraction", "clip_cov_lb": "low", "clip_cov_ub": "high"}
        tree[method] = {names[key]: value for key, value in recorded.items()}
    if method == "kl_cov":
        tree[method] = {"fraction": recorded["kl_cov_ratio"], "coefficient": recorded["ppo_kl_coef"]}
    config = AlgorithmConfig.model_validate({"method": method, **tree})
    if config.reduction != common["reduction"]:
        raise ValueError(f"{method} is reduced by {config.reduction}, the case by {common['reduction']}")
    if method != "stare":
        return config
    recorded = settings["stare"]
    stare = StareConfig.model_validate(
        {
            "variant": recorded["variant"],
            "weight_pos": recorded["reweight_w"],
            "weight_neg": recorded["reweight_m"],
            "target_entropy": recorded["target_entropy"],
        }
    ).model_copy(update={"fraction": recorded["top_p_ratio"]})  # the reference allows 0, our configuration does not
    return config.model_copy(update={"stare": stare})


def _control(case: Case, config: AlgorithmConfig) -> Control:
    recorded = case.get("controller")
    stare = config.stare
    if recorded is None:  # no controller given to the reference: gate open, weights of the configuration
        return Control(True, stare.weight_pos, stare.weight_neg, 0.0, stare.target_entropy)
    return Control(
        recorded["gate_on"],
        recorded["reweight_w"],
        recorded["reweight_m"],
        recorded["current_ent"],
        recorded["target_entropy"],
    )


def check_loss(method: str, case: Case) -> list[str]:
    """What of a loss case differs from the recording."""
    algorithm, config, inputs = ALGORITHMS[method], _algorithm_config(method, case), case["inputs"]
    mask_BT = torch.tensor(inputs["mask"], dtype=torch.float64)
    action_M = mask_BT.flatten() > 0
    logprob_BT = torch.tensor(inputs["log_prob"], dtype=torch.float64, requires_grad=True)

    def flat(name: str) -> torch.Tensor:
        return torch.tensor(inputs[name], dtype=torch.float64).flatten()[action_M]

    logprob_T = logprob_BT.flatten()[action_M]
    advantage_T = flat("advantages")
    entropy_T = torch.zeros_like(advantage_T)  # no recorded loss depends on it
    tokens = Candidates(
        -logprob_T.detach(),
        advantage_T,
        torch.ones_like(advantage_T, dtype=torch.bool),
        action_M.nonzero()[:, 0],
    )
    control = _control(case, config)
    weights = algorithm.weigh(tokens, control, config, OneRank())
    weight_T = weights.weight_T
    sequence_T = torch.arange(mask_BT.shape[0]).repeat_interleave(mask_BT.shape[1])[action_M]
    loss_T = algorithm.loss(
        LossInputs(
            logprob_T=logprob_T,
            old_logprob_T=flat("old_log_prob"),
            entropy_T=entropy_T,
            advantage_T=advantage_T,
            weight_T=weight_T,
            selected_T=weights.selection.selected_T,
            correction_T=flat("rollout_is_weights") if "rollout_is_weights" in inputs else torch.ones_like(advantage_T),
            sequences=Sequences(sequence_T, mask_BT.shape[0], OneRank()),
            control=control,
        ),
        config,
    ).loss_T
    lengths_B = mask_BT.sum(1)
    factor_T = token_factors(
        config.reduction,
        lengths_B[sequence_T],
        num_action_tokens=int(lengths_B.sum()),
        num_sequences=int((lengths_B > 0).sum()),
    )
    loss = (factor_T * loss_T).sum()
    loss.backward()
    faults = _far("loss", loss.item(), case["expected"]["loss"])
    faults += _far("gradient", logprob_BT.grad, case["expected"]["grad_log_prob"])
    if "weights" in case["expected"]:
        weight_M = torch.ones(action_M.shape[0], dtype=torch.float64).masked_scatter(action_M, weight_T)
        faults += _far("weights", weight_M.view_as(mask_BT), case["expected"]["weights"])
    return faults


def check_advantage(case: Case) -> list[str]:
    """What of a `grpo_advantage` case differs from the recording."""
    got = [0.0] * len(case["rewards"])
    for name in set(case["group"]):
        members = [i for i, g in enumerate(case["group"]) if g == name]
        rewards = [case["rewards"][i] for i in members]
        for i, advantage in zip(members, group_relative(rewards, normalize_std=case["normalize_by_std"]), strict=True):
            got[i] = advantage
    return _far("advantage", got, case["expected"])


def check_controller(case: Case) -> list[str]:
    """What of a `controller` case differs from the recording, over all its steps."""
    init = case["init"]
    names = {
        "reweight_w": "weight_pos",
        "reweight_m": "weight_neg",
        "w_max": "weight_pos_max",
        "m_min": "weight_neg_min",
    }
    config = AlgorithmConfig.model_validate({"stare": {names.get(key, key): value for key, value in init.items()}})
    state: ControllerState = controller.initial(config)
    faults: list[str] = []
    for i, step in enumerate(case["steps"]):
        state, control = controller.observe(config, state, EntropyReading(1, step["entropy"]))
        if control.gate_on != step["gate_on"]:
            faults.append(f"step {i}: gate {control.gate_on}, want {step['gate_on']}")
        faults += _far(f"step {i}: W", control.weight_pos, step["w"])
        faults += _far(f"step {i}: M", control.weight_neg, step["m"])
    return faults


CHECKS: dict[str, Callable[[Case], list[str]]] = {
    "cispo": lambda case: check_loss("cispo", case),
    "clip_cov": lambda case: check_loss("clip_cov", case),
    "controller": check_controller,
    "gmpo": lambda case: check_loss("gmpo", case),
    "grpo_advantage": check_advantage,
    "grpo_dual_clip": lambda case: check_loss("grpo", case),
    "gspo": lambda case: check_loss("gspo", case),
    "kl_cov": lambda case: check_loss("kl_cov", case),
    "stare": lambda case: check_loss("stare", case),
}


def run(folder: Path) -> tuple[int, list[str]]:
    """Number of cases passed and a line for each failure."""
    passed, failures = 0, []
    for file in sorted(folder.glob("*.json")):
        if file.stem not in CHECKS:
            failures.append(f"{file.name}: no method of this name; known: {', '.join(CHECKS)}")
            continue
        for i, case in enumerate(json.loads(file.read_text())):
            faults = CHECKS[file.stem](case)
            passed += not faults
            failures += [f"{file.name}[{i}]: {'; '.join(faults)}"] if faults else []
    return passed, failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Check recorded cases of the reference implementation.")
    parser.add_argument("folder", type=Path, help="folder of JSON case files")
    folder = parser.parse_args().folder
    if not any(folder.glob("*.json")):
        print(f"{folder}: no JSON case files", file=sys.stderr)
        return 2
    passed, failures = run(folder)
    print(*failures, sep="\n", end="\n" if failures else "")
    print(f"{passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
