"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from stare_megatron.config import Config, TrainerConfig
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.cures import value_text
from stare_megatron.plan.estimate import Plan
from stare_megatron.plan.memory import Phase, Use
from stare_megatron.plan.moves import HostMemory
from stare_megatron.plan.parameters import Layout, largest
from stare_megatron.plan.search import Proposal
from stare_megatron.plan.supervised import SupervisedPlan
from stare_megatron.plan.timing import Machine, PassTime, SaveTime

_GIB = 2**30
_SHOWN = 8


def show(plan: Plan, console: Console) -> None:
    """The whole plan."""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for label, text in headline(plan):
        say(f"{label:<11}{text}")
    say("")
    console.print(memory_table(plan.uses))
    say("")
    console.print(time_table(plan))
    say("")
    for problem in plan.violations:
        say(f"does not fit  {problem}", "red")
    if not plan.violations:
        use = plan.tightest()
        say(f"fits: {use.free / _GIB:.1f} GiB of a GPU are free in the {use.phase.value}, where the least is")


def show_supervised(plan: SupervisedPlan, console: Console) -> None:
    """The whole plan of a supervised run."""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    t, lengths = plan.config.trainer, plan.given.lengths
    batch = round(len(lengths.responses) * lengths.weight)
    rows = [
        ("plan", _hardware(t.world_size, plan.given.machine)),
        ("trainer", _ranks(t, plan.shape)),
        ("batch", f"{batch:,} sequences, {plan.tokens:,.0f} tokens, {lengths.action_share:.0%} of them learned"),
        *([("host", _host(plan.config, plan.host))] if plan.host.arenas or plan.host.saving else []),
        ("lengths", lengths.source),
    ]
    for label, text in rows:
        say(f"{label:<11}{text}")
    say("")
    console.print(memory_table(plan.uses))
    say("")
    table = Table("phase", "s", "what bounds it", box=None, header_style="bold")
    table.columns[1].justify = "right"
    moved = f"; {_seconds(plan.moved)} s of it trainer.offload" if plan.moved else ""
    rate = plan.tokens / plan.seconds
    table.add_row("update", _seconds(plan.seconds), f"{_pass(plan.update)}{moved}; {rate:,.0f} tokens/s")
    table.add_row("save", _seconds(plan.save.written), _saving(plan.save))
    console.print(table)
    say("")
    for problem in plan.violations:
        say(f"does not fit  {problem}", "red")
    if not plan.violations:
        say(f"fits: {plan.tightest().free / _GIB:.1f} GiB of a GPU are free")


def headline(plan: Plan) -> list[tuple[str, str]]:
    """Label and text of what the plan is of."""
    c, room = plan.config, plan.room
    i = c.inference
    return [
        ("plan", _hardware(plan.gpus, plan.given.machine)),
        ("trainer", _ranks(c.trainer, plan.shape)),
        ("engines", f"{i.engines}, TP {i.tensor_parallel}, {i.placement}"),
        (
            "KV cache",
            f"{max(0.0, room.kv) / _GIB:.1f} GiB an engine rank, {room.token / 1024:.0f} KiB a token: "
            f"{room.at_mean:,} sequences at mean length, {room.at_full:,} at full; {room.running:,} run at a time",
        ),
        *([("host", _host(c, plan.host))] if plan.host.arenas or plan.host.saving else []),
        ("lengths", plan.given.lengths.source),
    ]


def _hardware(gpus: int, m: Machine) -> str:
    layers = "Transformer Engine's layers" if m.layers is Layers.ENGINE else "Megatron-Core's own layers"
    return f"{gpus} x {m.gpu.name} ({m.gpu.memory / _GIB:.0f} GiB, {m.gpu.flops / 1e12:,.0f} TFLOP/s), {layers}"


def _ranks(t: TrainerConfig, shape: ModelShape) -> str:
    layout = Layout.of(t)
    fullest = max((largest(shape, layout, s) for s in range(layout.pipeline)), key=lambda h: h.parameters)
    return (
        f"{t.world_size} ranks: TP {t.tensor_parallel}, PP {t.pipeline_parallel}, CP {t.context_parallel}, EP "
        f"{t.expert_parallel}, DP {t.data_parallel}; at most {fullest.parameters:,} parameters a rank"
    )


def _host(config: Config, host: HostMemory) -> str:
    """Memory of a node beside what its processes take anyhow."""
    parts = {f"page-locked for {_movers(config)}": host.arenas, "while a checkpoint is written": host.saving}
    shown = ", ".join(f"{size / _GIB:,.0f} GiB {what}" for what, size in parts.items() if size)
    return f"{shown}, on a node of {host.ranks} ranks"


def _movers(config: Config) -> str:
    offload, kl = config.trainer.offload, config.algorithm.kl
    named = {"trainer.offload": bool(offload), "algorithm.kl": kl.on_host}
    return " and ".join(name for name, does in named.items() if does)


def memory_table(uses: Sequence[Use]) -> Table:
    """GiB of the fullest GPU, a row a part."""
    columns = [f"{use.phase.value}" + ("" if "+" in use.role else f", {use.role}") for use in uses]
    table = Table("GiB a GPU", box=None, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right")
    for name in dict.fromkeys(name for use in uses for name in use.parts):
        table.add_row(name, *(_gib(use.parts.get(name, 0.0)) for use in uses))
    table.add_row("total", *(_gib(use.total) for use in uses), style="bold")
    table.add_row("free", *(f"{use.free / _GIB:.1f}" for use in uses), style="bold")
    return table


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}" if size else "-"


def time_table(plan: Plan) -> Table:
    """Seconds of a step, a row a phase."""
    table = Table("phase", "s", "what bounds it", box=None, header_style="bold")
    table.columns[1].justify = "right"
    r, save = plan.rollout, plan.save
    refills = f", {r.refills} refills among them" if r.refills else ""
    pushed = f"{plan.push.bytes / _GIB:.1f} GiB of weights"
    rows = (
        (Phase.ROLLOUT, f"{r.bound}; {r.tokens:,} tokens{refills}", plan.moves.rollout),
        (Phase.SCORE, _pass(plan.score), plan.moves.score),
        (Phase.UPDATE, _pass(plan.update), plan.moves.update),
        (Phase.PUSH, pushed + (", in shards" if plan.config.sync.method == "sharded" else ""), plan.moves.push),
    )
    for phase, text, moved in rows:
        mover = "algorithm.kl" if phase is Phase.SCORE else "trainer.offload"
        offload = f"; {_seconds(moved)} s of it {mover}" if moved else ""
        table.add_row(phase.value, _seconds(plan.phase(phase)), text + offload)
    table.add_row("step", _seconds(plan.seconds), f"MFU of score and update {plan.mfu:.1%}", style="bold")
    table.add_row("save", _seconds(save.written), _saving(save))
    return table


def _saving(save: SaveTime) -> str:
    stands = f"{save.bytes / _GIB:,.0f} GiB; training stands {_seconds(save.seconds)} s"
    return f"{stands} of it, when one is due"


def _pass(p: PassTime) -> str:
    if not p.seconds:
        return 'none (trainer.scoring = "rollout")'
    bubble = f", bubbles {p.bubble_share:.0%}" if p.bubble else ""
    return f"{p.bound}; {p.micro_batches} micro-batches, MFU {p.mfu:.1%}{bubble}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if math.isfinite(value) else "never"


def first_lines(plan: Plan) -> list[tuple[str, str]]:
    """What a run says of its plan before it starts."""
    use = plan.tightest()
    times = " + ".join(f"{phase.value} {_seconds(plan.phase(phase))}" for phase in Phase)
    state = f"{use.total / _GIB:.0f} of {use.capacity / _GIB:.0f} GiB in the {use.phase.value}"
    return [
        ("plan", f"{_seconds(plan.seconds)} s a step ({times}), MFU {plan.mfu:.0%}; fullest GPU {state}"),
        *(("plan", f"does not fit: {problem}") for problem in plan.violations[:2]),
    ]


def show_search(found: Sequence[Proposal], console: Console) -> None:
    """The best proposals, a line each, and the settings of the first one."""

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    if not found:
        say("no layout of these GPUs fits; take more, or shorter sequences", "red")
        return
    say(
        f"{'s a step':>8}  TP PP VP CP EP  DP  {'engines':<17}{'recompute':<11}{'tokens':>6}  {'offload':<9}why", "bold"
    )
    for proposal in found[:_SHOWN]:
        t, i = proposal.plan.config.trainer, proposal.plan.config.inference
        sizes = (t.tensor_parallel, t.pipeline_parallel, t.virtual_pipeline, t.context_parallel, t.expert_parallel)
        layout = " ".join(f"{n:>2}" for n in sizes) + f" {t.data_parallel:>3}"
        engines = f"{i.engines} x TP {i.tensor_parallel}" + (", apart" if i.placement == "separate" else "")
        offload = ("bundles" if t.offload_step_mb else "yes") if t.offload else "-"
        say(
            f"{_seconds(proposal.plan.seconds):>8}  {layout}  {engines:<17}{t.recompute:<11}"
            f"{t.micro_batch_tokens:>6}  {offload:<9}{proposal.why}"
        )
    settings = " ".join(f"{key}={_argument(value)}" for key, value in found[0].changes.items())
    say(f"the first: {settings}")


def _argument(value: Any) -> str:
    """As a shell passes it on."""
    return f"'{value_text(value)}'" if isinstance(value, list | dict) else value_text(value)


def as_json(plan: Plan, found: Sequence[Proposal]) -> dict[str, Any]:
    """Bytes and seconds under the names of the code."""
    gpu = plan.given.machine.gpu
    return {
        "gpu": dataclasses.asdict(gpu),
        "gpus": plan.gpus,
        "fits": not plan.violations,
        "violations": list(plan.violations),
        "memory": [_use(use) for use in plan.uses],
        "kv": _plain(dataclasses.asdict(plan.room)),
        "seconds": {"step": _number(plan.seconds), "save": plan.save.seconds}
        | {phase.value: _number(plan.phase(phase)) for phase in Phase},
        "rollout": _plain(dataclasses.asdict(plan.rollout)),
        "score": _plain(dataclasses.asdict(plan.score)) | {"bound": plan.score.bound},
        "update": _plain(dataclasses.asdict(plan.update)) | {"bound": plan.update.bound},
        "push": dataclasses.asdict(plan.push),
        "save": dataclasses.asdict(plan.save),
        "offload": dataclasses.asdict(plan.moves),
        "host": dataclasses.asdict(plan.host),
        "mfu": plan.mfu,
        "search": [{"changes": p.changes, "seconds": p.plan.seconds, "why": p.why} for p in found],
    }


def supervised_json(plan: SupervisedPlan) -> dict[str, Any]:
    """As `as_json`, of a supervised run."""
    return {
        "gpu": dataclasses.asdict(plan.given.machine.gpu),
        "gpus": plan.config.trainer.world_size,
        "fits": not plan.violations,
        "violations": list(plan.violations),
        "memory": [_use(use) for use in plan.uses],
        "seconds": {"step": plan.seconds, "update": plan.seconds, "save": plan.save.seconds},
        "tokens": plan.tokens,
        "update": dataclasses.asdict(plan.update) | {"bound": plan.update.bound},
        "save": dataclasses.asdict(plan.save),
        "host": dataclasses.asdict(plan.host),
        "mfu": plan.update.mfu,
    }


def _use(use: Use) -> dict[str, Any]:
    return {"role": use.role, "phase": use.phase.value, "parts": dict(use.parts), "total": use.total, "free": use.free}


def _plain(table: dict[str, Any]) -> dict[str, Any]:
    return {name: value.value if isinstance(value, enum.Enum) else _number(value) for name, value in table.items()}


def _number(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
