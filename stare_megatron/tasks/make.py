"""A folder to train from: a warmed-up tiny model and its task's prompts.

OUT/model/          Hugging Face checkpoint
OUT/train.jsonl     prompts: {"id", "source", "prompt", "answer"}
OUT/eval.jsonl      held-out prompts, the same columns: to choose settings by
OUT/test.jsonl      further held-out prompts, as many: to report
OUT/made.json       the settings, what was measured, and the checksum that makes a reuse safe
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stare_megatron import tasks
from stare_megatron.tasks.folder import reuse_or_build, write_prompts
from stare_megatron.tasks.tiny_model import (
    Measured,
    TinyModelSettings,
    WarmedUp,
    make_model,
    make_tokenizer,
    measure,
    save,
    warm_up,
)

_FORMAT = 3  # raise it when equal settings no longer mean an equal folder


@dataclass(frozen=True)
class Made:
    """A made folder: `reused` when it was already there."""

    folder: Path
    reused: bool
    parameters: int
    warmed_up: WarmedUp
    measured: Measured

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def eval(self) -> Path:
        return self.folder / "eval.jsonl"


def make(settings: TinyModelSettings, out: Path, train_prompts: int, eval_prompts: int) -> Made:
    """Make `out`, or reuse it when it holds the same settings intact; a folder of other settings is replaced.

    Raises:
        UserError: `out` exists and was not made by this function, or cannot be written; unknown task; too many prompts.
        RunError: the warm-up does not learn.
    """

    def build(folder: Path) -> dict[str, Any]:
        return _build(folder, settings, train_prompts, eval_prompts)

    keys = {
        "format": _FORMAT,
        "torch": torch.__version__,
        "model": dataclasses.asdict(settings),
        "train_prompts": train_prompts,
        "eval_prompts": eval_prompts,
    }
    made, reused = reuse_or_build(out, keys, build)
    return Made(
        folder=out,
        reused=reused,
        parameters=made["parameters"],
        warmed_up=WarmedUp(**made["warmed_up"]),
        measured=Measured(**made["measured"]),
    )


def _build(folder: Path, settings: TinyModelSettings, train_prompts: int, eval_prompts: int) -> dict[str, Any]:
    task = tasks.get(settings.task)
    train = task.prompts("train", train_prompts, settings.seed)
    held_out = task.prompts("eval", eval_prompts, settings.seed)
    test = task.prompts("test", eval_prompts, settings.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum, so the weights, would depend on it
    try:
        tokenizer = make_tokenizer(task)
        model = make_model(settings)
        warmed_up = warm_up(model, tokenizer, settings, train)
        measured = measure(model, tokenizer, task, held_out[:256], samples=8)
    finally:
        torch.set_num_threads(threads)
    save(model, tokenizer, folder / "model")
    write_prompts(folder / "train.jsonl", task.name, train)
    write_prompts(folder / "eval.jsonl", task.name, held_out)
    write_prompts(folder / "test.jsonl", task.name, test)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "warmed_up": dataclasses.asdict(warmed_up),
        "measured": dataclasses.asdict(measured),
    }
