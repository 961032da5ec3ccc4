"""Weights & Biases. The only file that imports wandb; offline unless `logging.wandb` says otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

from stare_megatron.config import LoggingConfig
from stare_megatron.errors import UserError
from stare_megatron.metrics import wandb_id
from stare_megatron.metrics.catalogue import Metric, by_name
from stare_megatron.metrics.samples import SampleRow

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
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=not logging.wandb_system,
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
                job_type=logging.wandb_job_type or None,
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
        self._tables = logging.wandb_samples
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Sequence[Metric]) -> None:
        with _service():
            self._run.log({"step": step, **by_name(metrics)})

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        if self._tables:
            table = wandb.Table(columns=list(SampleRow._fields), data=[list(row) for row in rows])
            with _service():
                self._run.log({"step": step, "samples": table})

    def rewind(self, step: int) -> None:
        """Nothing to do: values are plotted over their step."""

    def close(self) -> None:
        with _service():
            self._run.finish()


@contextlib.contextmanager
def _service() -> Iterator[None]:
    """wandb's process hears SIGTERM even where it is blocked, and schedulers send it to every process of a job.

    Raises:
        ConnectionError: that process is gone.
    """
    try:
        yield
    except (ConnectionError, wandb.Error, MailboxClosedError, HandleAbandonedError) as e:
        with contextlib.suppress(ConnectionError):
            wandb.teardown()  # else it is tried, and fails, when Python ends
        cause = str(e).strip().partition("\n")[0] or type(e).__name__
        raise ConnectionError(
            f"wandb lost its process ({cause}); the rest of this start is in metrics.jsonl only"
        ) from e
