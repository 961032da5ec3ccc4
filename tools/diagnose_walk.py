"""Where a policy of the number walk has its entropy, and where it loses accuracy.

    stare-megatron convert RUN FOLDER
    python tools/diagnose_walk.py PROMPTS FOLDER...

At every word of a response the task knows after which words the goal can still be reached. So the entropy there has
three kinds: between right words (forks, where every choice can end well), of leaving them (slips), and whatever comes
after a slip, where nothing can. A response is right when it never slips: so the chances of slipping, by place, add up
to what is missing of the accuracy. Exact at each prefix; prefixes are sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from stare_megatron.tasks.number_walk import TASK

PLACES = ("move", "amount", "equals", "number")  # of a word in a move; a response ends where the next would begin
_MOST = 48  # tokens of a response
_BATCH = 32  # prompts at a time


@dataclass(frozen=True)
class Parts:
    """Of one place in a response: entropy between right words and of leaving them, nats, and the chance of leaving."""

    fork: float
    slip: float
    wrong: float


@dataclass(frozen=True)
class Diagnosis:
    """Means over responses: `right` of them, `tokens`, nats of each kind, and the chance to slip at each place."""

    right: float
    tokens: float
    fork: float
    slip: float
    after: float
    wrong: dict[str, float]


def parts(p_V: torch.Tensor, right: Sequence[int]) -> Parts:
    """`p_V`: float64 [V], chances of the next token; `right`: ids after which the goal can still be reached."""
    p_right = p_V[list(right)]
    kept = float(p_right.sum())
    fork = kept * _entropy(p_right / kept) if kept else 0.0
    return Parts(fork, _entropy(p_V) - fork, 1.0 - kept)


def _entropy(p: torch.Tensor) -> float:
    return float(torch.special.entr(p).sum())


def diagnose(folder: Path, prompts: Sequence[str], samples: int, seed: int) -> Diagnosis:
    """Of the policy in a Hugging Face checkpoint."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    found = [
        of
        for first in range(0, len(prompts), _BATCH)
        for of in _diagnosed(model, tokenizer, [p for p in prompts[first : first + _BATCH] for _ in range(samples)])
    ]
    n = len(found)
    return Diagnosis(
        *(sum(getattr(of, name) for of in found) / n for name in ("right", "tokens", "fork", "slip", "after")),
        wrong={place: sum(of.wrong[place] for of in found) / n for place in PLACES},
    )


@torch.no_grad()
def _diagnosed(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Diagnosis]:
    """One response a prompt."""
    tokenizer.padding_side = "left"
    asked = tokenizer(list(prompts), return_tensors="pt", padding=True)
    rules = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=_MOST,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    made = model.generate(asked["input_ids"], attention_mask=asked["attention_mask"], generation_config=rules)
    p_TBV = torch.stack(made.logits).double().softmax(-1)
    ids_BT = made.sequences[:, asked["input_ids"].shape[1] :].tolist()
    made_B = zip(prompts, ids_BT, p_TBV.unbind(1), strict=True)
    return [_of_response(tokenizer, prompt, ids, p_TV) for prompt, ids, p_TV in made_B]


def _of_response(tokenizer: Any, prompt: str, ids: Sequence[int], p_TV: torch.Tensor) -> Diagnosis:
    end = tokenizer.eos_token_id
    words: list[str] = []
    fork = slip = after = 0.0
    wrong: dict[str, float] = dict.fromkeys(PLACES, 0.0)
    tokens, right = 0, False
    for token, p_V in zip(ids, p_TV, strict=True):
        tokens += 1
        on = TASK.right_next(prompt, words)
        if on:
            of = parts(p_V, [tokenizer.convert_tokens_to_ids(word) if word else end for word in on])
            fork, slip = fork + of.fork, slip + of.slip
            wrong[PLACES[len(words) % 4]] += of.wrong
        else:
            after += _entropy(p_V)
        if token == end:
            right = "" in on
            break
        words.append(tokenizer.convert_ids_to_tokens(token))
    return Diagnosis(float(right), tokens, fork, slip, after, wrong)


def table(found: dict[str, Diagnosis]) -> Table:
    """A policy a row."""
    made = Table(box=None, padding=(0, 2), header_style="dim")
    made.add_column("policy")
    for name in ("right", "nats/token", "in forks", "in slips", "after a slip", *(f"slip: {p}" for p in PLACES)):
        made.add_column(name, justify="right")
    for name, d in found.items():
        nats = d.fork + d.slip + d.after
        shares = (f"{part / nats:.0%}" for part in (d.fork, d.slip, d.after))
        made.add_row(name, f"{d.right:.3f}", f"{nats / d.tokens:.3f}", *shares, *(f"{d.wrong[p]:.3f}" for p in PLACES))
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="JSONL of the task's prompts")
    parser.add_argument("folders", type=Path, nargs="+", help="Hugging Face checkpoints")
    parser.add_argument("--samples", type=int, default=32, help="responses a prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    args = parser.parse_args(argv)
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()]
    found = {folder.name: diagnose(folder, prompts, args.samples, args.seed) for folder in args.folders}
    Console(width=200).print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
