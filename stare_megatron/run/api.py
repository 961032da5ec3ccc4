"""What a notebook or a script calls; the command line does the same. `import stare_megatron` offers these names.

import stare_megatron as sm

config = sm.load_config("run.toml", {"run.steps": 50})
run = sm.train(config)
print(run.metrics["reward/mean"][-1])
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from stare_megatron.config import Config, load, parse
from stare_megatron.host.paths import given
from stare_megatron.metrics import eval_records, jsonl

Table = dict[str, list[float]]


def load_config(file: str | Path, changes: Mapping[str, Any] | None = None) -> Config:
    """A configuration from a TOML file. `changes`: dotted key -> value, as `key.sub=value` on the command line.

    Raises:
        UserError: unreadable file, unknown key, wrong value.

    Example:
        load_config("examples/demo_cpu/run.toml", {"run.steps": 20, "trainer.optimizer.lr": 5e-4})
    """
    return load(given(file, "file"), [f"{key}={_toml(value)}" for key, value in (changes or {}).items()])


def build_config(tables: Mapping[str, Any]) -> Config:
    """A configuration from nested tables, as a TOML file holds them.

    Raises:
        UserError: unknown key, wrong value.

    Example:
        build_config({"run": {"steps": 20}, "model": {"path": "model"}, "data": {"train": ["train.jsonl"]},
                      "reward": {"name": "math"}})
    """
    return parse(dict(tables), "build_config")


def _toml(value: Any) -> str:
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({"v": plain}).partition("=")[2].strip()


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended. `finished`: all its steps are done, not only those up to a Ctrl-C."""

    folder: Path
    finished: bool

    @property
    def metrics(self) -> Table:
        """See `read_metrics`."""
        return read_metrics(self.folder)

    @property
    def policy(self) -> Path:
        """The exported policy, a Hugging Face checkpoint (`checkpoint.export_final`)."""
        return self.folder / "hf"


def train(config: Config, *, quiet: bool = True) -> FinishedRun:
    """Train as `stare-megatron train` does, in this process, until the run's steps are done or Ctrl-C asks for an end.

    Starts and ends Ray. Where a run of that name has a checkpoint, `run.resume` decides. `quiet`: one plain line per
    step instead of the live display.

    Raises:
        UserError: found wrong before anything was started. RunError: the run had to stop.
    """
    from stare_megatron.run.train import train as run

    code = run(config, quiet=quiet, command=["stare_megatron.train"])
    return FinishedRun(config.folder, finished=code == 0)


def evaluate(config: Config, *, model: str | Path | None = None, out: str | Path | None = None) -> dict[str, float]:
    """Evaluate a policy on `eval.benchmarks` as `stare-megatron eval` does; returns metrics by name.

    `model`: a Hugging Face folder, a training checkpoint or a run's folder; None: `model.path`. `out`: a new folder for
    the results, None: beside the run's.

    Raises:
        UserError: found wrong before anything was started. RunError: the evaluation had to stop.
    """
    from stare_megatron.run.eval import evaluate as run

    folder = run(config, model=given(model, "model") if model else None, out=given(out, "out") if out else None)
    (row,) = jsonl.read(folder / eval_records.TABLE)
    return {name: value for name, value in row.items() if name != "step"}


def read_metrics(folder: str | Path) -> Table:
    """The metrics of a run's folder as columns: name -> a value per step, NaN where a step lacks it; `step` is one.

    `pandas.DataFrame(read_metrics(folder))` is the table.

    Raises:
        UserError: no metrics there, or damaged ones.
    """
    return _columns(jsonl.read(given(folder, "folder") / jsonl.FILE))


def read_evaluations(folder: str | Path) -> Table:
    """The evaluations of a run's folder, in the form of `read_metrics`.

    Raises:
        UserError: none there, or damaged ones.
    """
    return _columns(jsonl.read(given(folder, "folder") / eval_records.TABLE))


def _columns(rows: list[jsonl.Row]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}
