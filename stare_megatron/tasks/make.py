"""A folder to train from: a warmed-up tiny model and its task's prompts, made once and then reused.

OUT/model/          Hugging Face checkpoint
OUT/train.jsonl     prompts: {"id", "source", "prompt", "answer"}
OUT/eval.jsonl      held-out prompts, the same columns
OUT/made.json       the settings, what was measured, and the checksum that makes a reuse safe
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from stare_megatron import tasks
from stare_megatron.errors import UserError
from stare_megatron.tasks.base import TaskPrompt
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

_RECORD = "made.json"
_FORMAT = 1  # raise it when equal settings no longer mean an equal folder


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
        UserError: `out` exists and was not made by this function, or cannot be written.
        RunError: the warm-up does not learn.
    """
    wanted = {
        "format": _FORMAT,
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
        "train_prompts": train_prompts,
        "eval_prompts": eval_prompts,
    }
    found = _reusable(out, wanted)
    if found:
        return found
    if out.exists() and not (out / _RECORD).is_file():
        raise UserError(f"{out}: exists and was not made by this tool; name another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as e:
        raise UserError(f"{out}: cannot be written: {e.strerror}") from e
    try:
        _build(scratch / "new", settings, train_prompts, eval_prompts, wanted)
        if out.exists():
            out.rename(scratch / "old")
        try:
            (scratch / "new").rename(out)
        except OSError:
            found = _reusable(out, wanted)  # another process made the same folder meanwhile
            if not found:
                raise
            return found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return dataclasses.replace(_read(out, wanted), reused=False)


def _build(
    folder: Path, settings: TinyModelSettings, train_prompts: int, eval_prompts: int, wanted: dict[str, object]
) -> None:
    task = tasks.get(settings.task)
    train = task.prompts("train", train_prompts, settings.seed)
    held_out = task.prompts("eval", eval_prompts, settings.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of a sum, so the weights, would depend on it
    try:
        tokenizer = make_tokenizer(task)
        model = make_model(settings)
        warmed_up = warm_up(model, tokenizer, settings, train)
        measured = measure(model, tokenizer, task, held_out[:256], samples=8)
    finally:
        torch.set_num_threads(threads)
    folder.mkdir()
    save(model, tokenizer, folder / "model")
    write_prompts(folder / "train.jsonl", task.name, train)
    write_prompts(folder / "eval.jsonl", task.name, held_out)
    record = wanted | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "warmed_up": dataclasses.asdict(warmed_up),
        "measured": dataclasses.asdict(measured),
        "sha256": _checksum(folder),
    }
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n")


def write_prompts(path: Path, source: str, prompts: list[TaskPrompt]) -> None:
    """One JSON object a line, under the default keys of the `[data]` table."""
    rows = [{"id": p.id, "source": source, "prompt": p.text, "answer": p.answer} for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _RECORD):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _reusable(out: Path, wanted: dict[str, object]) -> Made | None:
    """The folder, if it was made from these settings and no file of it has changed since."""
    try:
        return _read(out, wanted)
    except (OSError, ValueError):
        return None


def _read(out: Path, wanted: dict[str, object]) -> Made:
    record = json.loads((out / _RECORD).read_text())
    if any(record.get(key) != value for key, value in wanted.items()) or record["sha256"] != _checksum(out):
        raise ValueError(f"{out} was made from other settings, or changed")
    return Made(
        folder=out,
        reused=True,
        parameters=record["parameters"],
        warmed_up=WarmedUp(**record["warmed_up"]),
        measured=Measured(**record["measured"]),
    )
