"""Log-probs of what a run sampled, computed again by the policy of the version that drew each token.

The run keeps every version (`EVERY_VERSION`): version v is `exports/step_v` of its folder, version 0 the model that it
began with. Temperature 1. What computes again is transformers, in float32, with nothing cached.
"""

from __future__ import annotations

import collections
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

EVERY_VERSION: dict[str, object] = {
    "checkpoint.export_every": 1,
    "logging.samples_every": 1,
    "logging.samples": 4096,
}
_ROWS = 64  # sequences in a forward pass


@dataclass(frozen=True)
class Stretch:
    """Tokens of one trajectory that one version drew without a break. `step`: that learned from it; `begin`: of its
    first token in the whole sequence; `nth`: 0 for the trajectory's first stretch, more after a push that went through
    it; `gap`: largest |log-prob difference|, nats."""

    step: int
    prompt: str
    sample: int
    version: int
    nth: int
    begin: int
    tokens: int
    gap: float


@dataclass(frozen=True)
class _Sampled:
    step: int
    prompt: str
    sample: int
    token_ids: list[int]
    stretches: list[tuple[int, int, list[float]]]  # version, place of the first token, log-probs


def rescored(run: Path, model: Path) -> list[Stretch]:
    """Every stretch of every trajectory in the run's `samples/`. `model`: the checkpoint folder it began with."""
    samples = [s for file in sorted((run / "samples").glob("step_*.jsonl")) for s in _sampled(file)]
    wanted: dict[int, list[int]] = collections.defaultdict(list)
    for i, s in enumerate(samples):
        for version in {version for version, _, _ in s.stretches}:
            wanted[version].append(i)
    scores = {
        (version, i): row
        for version, which in wanted.items()
        for i, row in _scores(_folder(run, model, version), samples, which).items()
    }
    return [
        Stretch(
            *(s.step, s.prompt, s.sample, version, nth, begin, len(logprobs)),
            gap=(torch.tensor(logprobs) - scores[version, i][begin - 1 : begin - 1 + len(logprobs)]).abs().max().item(),
        )
        for i, s in enumerate(samples)
        for nth, (version, begin, logprobs) in enumerate(s.stretches)
    ]


def _folder(run: Path, model: Path, version: int) -> Path:
    return run / "exports" / f"step_{version:06d}" if version else model


def _sampled(file: Path) -> list[_Sampled]:
    found = []
    for line in map(json.loads, file.read_text().splitlines()):
        ids: list[int] = []
        stretches: list[tuple[int, int, list[float]]] = []
        for span in line["spans"]:
            at = 0
            for version, tokens in span.get("policy_versions", ()):
                stretches.append((version, len(ids) + at, span["rollout_logprobs"][at : at + tokens]))
                at += tokens
            ids += span["token_ids"]
        found.append(_Sampled(line["step"], line["prompt_id"], line["sample"], ids, stretches))
    return found


@torch.no_grad()
def _scores(folder: Path, samples: list[_Sampled], which: list[int]) -> dict[int, torch.Tensor]:
    """By number of the sample: the log-prob of each of its tokens but the first, float32 [tokens - 1]."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = {}
    for start in range(0, len(which), _ROWS):
        rows = which[start : start + _ROWS]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(samples[i].token_ids) for i in rows], batch_first=True)
        # Padding is on the right, where nothing that counts attends to it.
        logprobs = network(input_ids=ids).logits[:, :-1].log_softmax(-1)
        own = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        found |= {i: own[row, : len(samples[i].token_ids) - 1] for row, i in enumerate(rows)}
    return found
