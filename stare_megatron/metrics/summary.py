"""What a run says before its first step and after its last: what starts, what came of it, what to do next."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stare_megatron.config import Config
from stare_megatron.host import device, program
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.advice import Settings, advise
from stare_megatron.metrics.console import clock, last_checkpoint, mean

_WINDOW = 10
_LONG = 20  # steps of a run that one would not like to lose


@dataclass(frozen=True)
class Summary:
    """What a run did. `first` and `last` are means over its first and last `window` steps (all starts together).

    Entropies in nats per token; `gate_duty`: fraction of steps with an open gate; `mismatch_max_mean`: the largest of
    the steps' mean |trainer - engine| log-prob, nats; `seconds`: sum of the steps' times; peaks in MB, 0: not measured;
    `advice`: of its last steps.
    """

    steps: int
    window: int
    reward_first: float
    reward_last: float
    entropy_first: float
    entropy_last: float
    target_entropy: float
    gate_duty: float
    mismatch_max_mean: float
    seconds: float
    trained_tokens: float
    trainer_peak: float
    engine_peak: float
    advice: tuple[str, ...] = ()


def summarize(run_folder: Path, settings: Settings | None = None) -> Summary:
    """Read `metrics.jsonl`. `settings`: what advice depends on.

    Raises:
        UserError: no metrics file, a damaged one, or no step in it.
    """
    rows = jsonl.read_steps(run_folder / jsonl.FILE)
    window = max(1, min(_WINDOW, len(rows) // 2))
    first, last = rows[:window], rows[-window:]
    return Summary(
        steps=len(rows),
        window=window,
        reward_first=mean(first, "reward/mean"),
        reward_last=mean(last, "reward/mean"),
        entropy_first=mean(first, "policy/entropy"),
        entropy_last=mean(last, "policy/entropy"),
        target_entropy=rows[-1].get("policy/target_entropy", math.nan),
        gate_duty=mean(rows, "stare/gate"),
        mismatch_max_mean=max((row["mismatch/mean"] for row in rows if "mismatch/mean" in row), default=math.nan),
        seconds=sum(row.get("time/step", 0.0) for row in rows),
        trained_tokens=sum(row.get("throughput/trained_tokens", 0.0) for row in rows),
        trainer_peak=max(row.get("memory/trainer_peak", 0.0) for row in rows),
        engine_peak=max(row.get("memory/engine_peak", 0.0) for row in rows),
        advice=tuple(found.text for found in advise(rows, settings or Settings())),
    )


def opening(config: Config, parameters: int, prompts: int, benchmarks: Mapping[str, int]) -> str:
    """What is about to start, some lines. `parameters`: of the model; `benchmarks`: name -> number of prompts."""
    r, t, i = config.rollout, config.trainer, config.inference
    machine = device.gpu_summary() or f"no GPU found: running on the CPU, {os.cpu_count()} cores"
    held_out = ", ".join(f"{name} ({count:,})" for name, count in benchmarks.items()) or "none"
    rows = (
        ("model", f"{config.model.path}, {parameters:,} parameters, {config.model.dtype}"),
        ("device", machine if config.cluster.address == "local" else f"Ray cluster, {config.cluster.address}"),
        (
            "trainer",
            f"{t.world_size} rank{'s' * (t.world_size > 1)}: TP {t.tensor_parallel}, PP {t.pipeline_parallel}, "
            f"CP {t.context_parallel}, EP {t.expert_parallel}, DP {t.data_parallel}",
        ),
        ("engines", f"{i.engines}, TP {i.tensor_parallel}, {i.placement}"),
        ("weights", _pushes(config)),
        (
            "data",
            f"{prompts:,} prompts, {r.prompts_per_step} x {r.group_size} samples per step; benchmarks: {held_out}",
        ),
        ("run folder", str(config.folder)),
        ("live page", f"{program.called()} watch {shlex.quote(str(config.folder))}"),
    )
    return "\n".join(f"{label:<11}{text}" for label, text in rows)


def _pushes(config: Config) -> str:
    """How weights go to the engines."""
    transport = device.weight_transport(config.inference.placement == "colocated", config.sync.method)
    if transport == "sharded":
        return "pushed in shards (sync.method)"
    return f"pushed as whole tensors, by {transport} (sync.method)"


def opening_notes(config: Config, prompts: int, dropped: int) -> list[str]:
    """What is legal and may surprise. `dropped`: prompts that were too long."""
    notes = []
    if dropped:
        limit = f"data.max_prompt_tokens = {config.data.max_prompt_tokens}"
        notes.append(f"{dropped} of {dropped + prompts} prompts are longer than {limit} and were dropped")
    if prompts < config.rollout.prompts_per_step:
        few = f"{prompts} prompt{'s' * (prompts > 1)}, fewer than the {config.rollout.prompts_per_step} of a step"
        notes.append(f"data.train has {few} (rollout.prompts_per_step): a step samples some more than once")
    if not config.checkpoint.every and config.run.steps > _LONG:
        notes.append(
            "checkpoint.every = 0: nothing is saved before the last step, unless the run is stopped or ends in an "
            f"error; a crash may lose all {config.run.steps} steps"
        )
    return notes


def next_steps(config: Config, finished: bool) -> str:
    """Commands that follow on a run that is over, a line each."""
    run, called = shlex.quote(str(config.folder)), program.called()
    commands = {
        "curves": f"tensorboard --logdir {run}/tensorboard" if config.logging.tensorboard else "",
        "upload": f"wandb sync {run}/wandb/offline-run-*" if config.logging.wandb == "offline" else "",
        "report": f"{called} compare {run}",
        "ask it": f"{called} sample {run}",
        "evaluate": f"{called} eval {run}/config.toml --model {run}" if config.eval.benchmarks else "",
    }
    lines = [f"{label:<11}{command}" for label, command in commands.items() if command]
    return "\n".join([*lines, how_to_go_on(config, finished=finished)])


def how_to_go_on(config: Config, *, finished: bool) -> str:
    """The last lines of every run: its logs, its newest checkpoint or that it has none, and the command that goes on,
    or starts over. `finished`: all steps are done, so that going on takes more of them."""
    folder, saved = config.folder, last_checkpoint(config.folder)
    command = f"{program.called()} train {shlex.quote(str(folder))}/config.toml run.resume=auto"
    if finished:
        command += f" run.steps={2 * config.run.steps}"
        if config.trainer.optimizer.schedule != "constant":  # another length is another schedule
            command += " 'run.resume_allow=[\"run.steps\"]'"
    rows = {
        "logs": f"{folder}/logs",
        "saved": str(saved or "no checkpoint was saved"),
        "go on" if finished else "resume" if saved else "start over": command,
    }
    return "\n".join(f"{label:<11}{text}" for label, text in rows.items())


def render(
    summary: Summary,
    name: str,
    paths: Sequence[tuple[str, Path]],
    planned: Sequence[tuple[str, str]] = (),
    *,
    finished: bool,
) -> RenderableType:
    """For `rich.console.Console.print`. `paths`: label and path of what the run wrote; absent ones are left out.
    `planned`: label and text of the plan against what was measured."""
    s = summary
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    # A path is cut where the terminal ends only when it must, never shortened.
    table.add_column(overflow="fold")
    change = s.reward_last - s.reward_first
    over = f"first and last {s.window} of {s.steps} steps" if s.steps > 1 else "1 step"
    table.add_row("reward", f"{s.reward_first:.3f} -> {s.reward_last:.3f} ({change:+.3f}; {over})")
    target = "" if math.isnan(s.target_entropy) else f", target {s.target_entropy:.3f}"
    table.add_row("entropy", f"{s.entropy_first:.3f} -> {s.entropy_last:.3f} nats per token{target}")
    if not math.isnan(s.gate_duty):
        table.add_row("gate", f"open in {s.gate_duty:.0%} of the steps")
    table.add_row("engine vs trainer", f"mean |log-prob difference| at most {s.mismatch_max_mean:.1e} nats")
    each = s.seconds / s.steps
    table.add_row("time", f"{clock(s.seconds)}, {each:.1f} s per step; {s.trained_tokens:,.0f} tokens trained on")
    if s.trainer_peak or s.engine_peak:
        table.add_row("peak memory", f"trainer rank {s.trainer_peak:,.0f} MB, engine {s.engine_peak:,.0f} MB")
    for text in s.advice:
        table.add_row("advice", Text(text, style="yellow"))
    for label, text in planned:
        table.add_row(label, text)
    for label, path in paths:
        if path.exists():
            table.add_row(label, str(path))
    return Panel(
        table, title=f"{name}: {'done' if finished else 'interrupted'}", title_align="left", border_style="dim"
    )
