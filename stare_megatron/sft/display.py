"""What a supervised run says before its first step and after its last."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table

from stare_megatron.config import SftConfig
from stare_megatron.data.supervised import SequenceSet
from stare_megatron.host import device, program
from stare_megatron.metrics import eval_records, jsonl
from stare_megatron.metrics.console import clock, last_checkpoint, mean

_WINDOW = 10


def opening(config: SftConfig, parameters: int, train: SequenceSet, held_out: SequenceSet | None) -> str:
    """What is about to start, some lines. `config`: `run.steps` is settled; `parameters`: of the model."""
    t, s = config.trainer, config.sft
    machine = device.gpu_summary() or f"no GPU found: running on the CPU, {os.cpu_count()} cores"
    batch = f"batches of {s.batch_tokens:,} tokens" if s.batch_tokens else f"batches of {s.batch_sequences} sequences"
    epochs = f"{s.epochs} epoch{'s' * (s.epochs > 1)} in {batch}, {config.run.steps:,} steps"
    aside = f"{len(held_out):,} sequences, {int(held_out.learn.sum()):,} learned tokens" if held_out else "none"
    rows = (
        ("model", f"{config.model.path}, {parameters:,} parameters, {config.model.dtype}"),
        ("device", machine if config.cluster.address == "local" else f"Ray cluster, {config.cluster.address}"),
        (
            "trainer",
            f"{t.world_size} rank{'s' * (t.world_size > 1)}: TP {t.tensor_parallel}, PP {t.pipeline_parallel}, "
            f"CP {t.context_parallel}, EP {t.expert_parallel}, DP {t.data_parallel}",
        ),
        (
            "data",
            f"{train.counts.rows:,} rows, {len(train):,} sequences, {len(train.tokens):,} tokens, of them "
            f"{int(train.learn.sum()):,} learned; {epochs}",
        ),
        ("held out", aside),
        ("run folder", str(config.folder)),
    )
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def notes(config: SftConfig, key: str, sequences: SequenceSet) -> list[str]:
    """What is legal and may surprise. `key`: that names the files."""
    counts, limit = sequences.counts, f"sft.max_tokens = {config.sft.max_tokens}"
    found = []
    if counts.truncated:
        found.append(f"{key}: {counts.truncated:,} sequences are longer than {limit} and were cut off there")
    if counts.dropped:
        why = "or begin what is learned beyond it " if config.sft.overlong == "truncate" else ""
        found.append(f"{key}: {counts.dropped:,} sequences are longer than {limit} {why}and were dropped")
    if counts.split:
        found.append(
            f"{key}: the chat template writes earlier answers otherwise once others follow: {counts.split:,} "
            "conversations became one sequence an answer"
        )
    return found


def how_to_go_on(config: SftConfig, *, finished: bool) -> str:
    """The last lines of every run: its logs, its newest checkpoint, and the command that goes on."""
    folder, saved = config.folder, last_checkpoint(config.folder)
    rows = {"logs": f"{folder}/logs", "saved": str(saved or "no checkpoint was saved")}
    path = shlex.quote(str(folder))
    if finished and config.checkpoint.export_final:
        rows["train"] = f"{program.called()} train RUN.toml model.path={path}/hf"
    elif finished:  # `train` begins with a Hugging Face folder
        rows["convert"] = f"{program.called()} convert {path} FOLDER"
    else:
        label = "resume" if saved else "start over"
        rows[label] = f"{program.called()} sft {path}/config.toml run.resume=auto"
    return "\n".join(f"{label:<11}{text}" for label, text in rows.items())


def summary(config: SftConfig, paths: Sequence[tuple[str, Path]], *, finished: bool) -> RenderableType:
    """Of a run with at least one step. `paths`: label and path of what it may have written."""
    rows = jsonl.read_steps(config.folder / jsonl.FILE)
    window = max(1, min(_WINDOW, len(rows) // 2))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def change(name: str) -> str:
        return f"{mean(rows[:window], name):.4f} -> {mean(rows[-window:], name):.4f} nats per token"

    over = f"first and last {window} of {len(rows)} steps" if len(rows) > 1 else "1 step"
    table.add_row("loss", f"{change('update/loss')} ({over})")
    held_out = _held_out(config.folder)
    if held_out:
        best = min(held_out, key=held_out.__getitem__)
        first, last = (held_out[step] for step in (min(held_out), max(held_out)))
        table.add_row("held-out loss", f"{first:.4f} -> {last:.4f}, lowest {held_out[best]:.4f} at step {best}")
    table.add_row("entropy", change("policy/entropy"))
    seconds = sum(row.get("time/step", 0.0) for row in rows)
    tokens = sum(row.get("throughput/trained_tokens", 0.0) for row in rows)
    table.add_row("time", f"{clock(seconds)}, {seconds / len(rows):.1f} s per step; {tokens:,.0f} tokens learned")
    peak = max(row.get("memory/trainer_peak", 0.0) for row in rows)
    table.add_row("peak memory", f"trainer rank {peak:,.0f} MB")
    for label, path in paths:
        if path.exists():
            table.add_row(label, str(path))
    title = f"{config.run.name}: {'done' if finished else 'interrupted'}"
    return Panel(table, title=title, title_align="left", border_style="dim")


def _held_out(folder: Path) -> dict[int, float]:
    table = folder / eval_records.TABLE
    rows = jsonl.read(table) if table.is_file() else []
    return {int(row["step"]): row["sft/held_out_loss"] for row in rows}
