"""Whether the machines are fit for a run: `stare-megatron doctor`, and its short form at every start."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.config import Config
from stare_megatron.doctor import checks, survey
from stare_megatron.errors import UserError
from stare_megatron.host import program


def short(config: Config, folder: Path | None) -> None:
    """Look at the nodes for what would stop a run or make its checkpoints worthless, before it takes a GPU: about 50 ms
    on one machine; on a cluster what the start of a process on each node takes. `folder`: one of the run's, which all
    nodes must share; None where nothing need be shared.

    Raises:
        UserError: the first such thing.
    """
    found = checks.find(survey.short(config, folder), config, checks.SHORT)
    if found:
        count = f"{len(found) - 1} more problem{'s' if found[2:] else ''}"
        more = f" ({count}: `{program.called()} doctor RUN.toml` lists all)" if found[1:] else ""
        raise UserError(f"{found[0]}{more}")
