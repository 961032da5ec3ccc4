"""Weights & Biases. The only file that imports wandb; offline unless `logging.wandb` says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

from stare_megatron.config import LoggingConfig
from stare_megatron.errors import UserError
from stare_megatron.metrics import wandb_id
from stare_megatron.metrics.catalogue import Metric, by_name
from stare_megatron.metrics.wandb_log import read_log

FOLDER = "wandb"


class WandbSink:
    """Logs to one wandb run. Its id is kept in `folder/run_id`, so a resumed run continues it.

    Values are plotted over their own `step`, so that steps repeated after a resume are kept and not dropped.

    Args:
        folder: where wandb keeps its files.
        logging: its mode is not `disabled`. config: the resolved configuration, as nested JSON-like values.

    Raises:
        UserError: wandb refuses to start (no login for `online`, no network).
    """

    def __init__(self, folder: Path, logging: LoggingConfig, name: str, config: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        wandb_id.keep(folder.parent, wandb_id.new())
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True, x_disable_stats=True
        )
        try:
            self._run = wandb.init(
                id=wandb_id.read(folder.parent),
                # wandb calls its folder "wandb" itself.
                dir=str(folder.parent),
                mode=logging.wandb,
                project=logging.wandb_project,
                entity=logging.wandb_entity or None,
                group=logging.wandb_group or None,
                tags=logging.wandb_tags,
                notes=logging.wandb_notes or None,
                name=name,
                config=config,
                resume="allow" if logging.wandb == "online" else None,
                settings=settings,
            )
        except wandb.Error as e:
            first = str(e).strip().splitlines()[0]
            key = f"logging.wandb = {logging.wandb!r}"
            raise UserError(f"{key}: wandb does not start: {first}; use logging.wandb=offline or disabled") from e
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        self._run.log({"step": step, **by_name(metrics)})

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class OfflineRun:
    """A wandb run read from disk. `rows`: one dictionary a logged step, the key `step` included; `config`: nested.

    `commit`: as wandb recorded it, or ""; `torn`: the last record was cut off in writing.
    """

    run_id: str
    name: str
    config: dict[str, Any]
    commit: str
    rows: list[dict[str, float]]
    torn: bool


def read_offline(file: Path) -> OfflineRun:
    """Read the `run-ID.wandb` file of an offline run, also one that is still going.

    Values that are not numbers are left out. A row without a `step` of its own gets wandb's.

    Raises:
        UserError: no wandb file, or a damaged one.
    """
    log = read_log(file)
    run_id = name = commit = ""
    config: dict[str, Any] = {}
    rows: list[dict[str, float]] = []
    for number, data in enumerate(log.records, 1):
        record: Any = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        try:
            record.ParseFromString(data)
        except DecodeError as e:
            raise UserError(f"{file}: record {number} is not one of wandb {wandb.__version__} ({e})") from e
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id, name, commit = record.run.run_id, record.run.display_name, record.run.git.commit
            config |= _values(record.run.config.update)
        elif kind == "config":
            config |= _values(record.config.update)
        elif kind == "history":
            row = {key: float(v) for key, v in _values(record.history.item).items() if _is_number(v)}
            number: float = record.history.step.num
            row["step"] = float(int(row.get("step", number)))
            rows.append(row)
    config.pop("_wandb", None)
    return OfflineRun(run_id, name or run_id, config, commit, rows, log.torn)


def _values(items: Iterable[Any]) -> dict[str, Any]:
    """Key -> value of wandb's items; older wandb writes JSON only, newer a field a type. Nested keys are joined."""
    found: dict[str, Any] = {}
    for item in items:
        key = "/".join(item.nested_key) or item.key
        for field, value in item.ListFields():
            if field.name in ("value_json", "json"):
                found[key] = json.loads(value)
            elif field.name in ("number", "integer"):
                found[key] = value
    return found


def _is_number(value: Any) -> bool:
    """Numbers, and the strings by which JSON carries those that are not finite."""
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("NaN", "Infinity", "-Infinity")
