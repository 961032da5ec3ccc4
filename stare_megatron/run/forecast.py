"""What a run says of itself before it starts, and at its end against what was measured: the plan of this machine's
GPUs; on a CPU the memory alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.console import mean
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan import display, hardware, lengths
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.estimate import Given, Plan, make
from stare_megatron.plan.memory import Phase
from stare_megatron.plan.timing import Machine
from stare_megatron.run.machine import cpu_memory_bytes, on_gpus

_GIB = 2**30
_MB = 2**20  # of the metrics of memory
_WARM = 1  # steps at the start whose times are left out


@dataclass(frozen=True)
class Forecast:
    """`plan`: of the GPUs, None on a CPU and where they are not known; `host`: bytes of a run on a CPU, else 0."""

    config: Config
    plan: Plan | None
    host: int

    def lines(self) -> list[tuple[str, str]]:
        """Label and text, before the first step."""
        if self.plan is not None:
            return display.first_lines(self.plan)
        if self.host:
            all_of_it = psutil.virtual_memory().total / _GIB
            return [("plan", f"about {self.host / _GIB:.1f} of this machine's {all_of_it:.1f} GiB of memory")]
        return []

    def against(self, folder: Path) -> list[tuple[str, str]]:
        """Label and text of plan and measurement, after the last step: of a plan made again with the run's own lengths
        and largest micro-batch, so that they differ by what the plan gets wrong and not by what it could not know."""
        if self.plan is None and not self.host:
            return []
        rows = jsonl.read_steps(folder / jsonl.FILE)
        if self.plan is None:
            most = max((row.get("memory/host_run", 0.0) for row in rows), default=0.0) * _MB
            return [("plan", f"memory {compared(self.host / _GIB, most / _GIB, 'GiB')}")] if most else []
        plan = _as_it_ran(self.plan, folder, rows)
        found = []
        warm = rows[_WARM:] or rows
        for phase in Phase:
            planned, measured = plan.phase(phase), mean(warm, f"time/{phase.value}")
            found.append(("plan" if not found else "", f"{phase.value} {compared(planned, measured, 's')}"))
        waited = [row["time/save"] for row in rows if row.get("time/save", 0.0) > 0]
        if waited:
            found.append(("", f"save, waited for {compared(plan.save.seconds, sum(waited) / len(waited), 's')}"))
        peak = max((row.get("memory/trainer_peak", 0.0) for row in rows), default=0.0) * _MB
        found.append(("", f"rank's memory {compared(allocated(plan) / _GIB, peak / _GIB, 'GiB')}"))
        return found


def compared(planned: float, measured: float, unit: str) -> str:
    """Both, and how far the plan is off."""
    off = f" ({planned / measured - 1:+.0%})" if measured > 0 else ""
    return f"{planned:,.1f} {unit} planned, {measured:,.1f} measured{off}"


def allocated(plan: Plan) -> float:
    """Bytes that torch allocates on the fullest rank in an update, as `torch.cuda.max_memory_allocated` counts."""
    (use,) = [u for u in plan.uses if u.phase is Phase.UPDATE and "rank" in u.role]
    others = ("rank: allocator", "rank: CUDA and NCCL")
    return sum(n for name, n in use.parts.items() if name.startswith("rank") and name not in others)


def forecast(config: Config) -> Forecast:
    """Of the GPUs that this process sees, which are taken to be those of the run.

    Raises:
        UserError: `logging.plan_constants` cannot be read.
    """
    shape = read_hf_config(config.model.path)
    if on_gpus(config) is False:
        return Forecast(config, None, cpu_memory_bytes(config, shape))
    gpu = _gpu()
    if gpu is None:
        return Forecast(config, None, 0)
    engine = importlib.util.find_spec("transformer_engine") is not None
    file = config.logging.plan_constants
    constants = hardware.read_constants(Path(file)) if file else hardware.CONSTANTS
    machine = Machine(gpu, constants, Layers.ENGINE if engine else Layers.LOCAL)
    count = config.rollout.prompts_per_step * config.rollout.group_size
    known = lengths.assumed(
        count, longest=config.rollout.max_response_tokens, longest_prompt=config.data.max_prompt_tokens
    )
    return Forecast(config, make(config, shape, Given(machine, known)), 0)


def peak_flops(config: Config) -> float:
    """Of one of the run's GPUs in its precision, FLOP/s; NaN where that is not known."""
    gpu = None if on_gpus(config) is False or config.model.dtype == "float32" else _gpu()
    return gpu.flops if gpu else math.nan


def _gpu() -> hardware.Gpu | None:
    """The first that this process sees; None without, and for one that is not in the table."""
    seen = device.gpus()
    try:
        gpu = hardware.find(seen[0].name) if seen else None
    except UserError:
        return None
    return dataclasses.replace(gpu, memory=seen[0].bytes or gpu.memory) if gpu else None


def _as_it_ran(plan: Plan, folder: Path, rows: Sequence[Mapping[str, float]]) -> Plan:
    r, data = plan.config.rollout, plan.config.data
    count = r.prompts_per_step * r.group_size
    try:
        found = lengths.of_run(folder, count, longest=r.max_response_tokens, longest_prompt=data.max_prompt_tokens)
    except UserError:
        return plan
    largest = int(max((row.get("packing/largest_tokens", 0) for row in rows), default=0))
    return make(plan.config, plan.shape, dataclasses.replace(plan.given, lengths=found, largest=largest), cures=False)


def as_text(lines: Sequence[tuple[str, str]]) -> str:
    """Below the lines that say what starts."""
    return "\n".join(f"{label:<11}{text}" for label, text in lines)
