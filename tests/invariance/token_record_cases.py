"""What the tests of token records run on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import Rank
from step_cases import Overrides, Ports, first_tokens, load, make_config, make_groups, selected_ids, start

from stare_megatron.types import Control
from stare_megatron.types.token_record import TokenRecord


def records(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides]) -> dict[str, dict[str, Any]]:
    """Of each case: what this rank says of every trajectory of a step, what it selected, and what is left after."""
    ports, found = Ports(rank), {}
    groups = make_groups()
    wanted = frozenset(first_tokens(groups).values())
    for name, overrides in cases.items():
        config = make_config(checkpoint, overrides)
        trainer = start(ports.next(), config)
        load(trainer, config, groups)
        control = Control(True, 1.5, 0.5, trainer.score().entropy, 9.0)
        selected = selected_ids(trainer, config, control)
        trainer.update(control, keep_tokens=True)
        kept: dict[int, TokenRecord] = trainer.token_records(wanted)
        again = trainer.token_records(wanted)
        load(trainer, config, groups)
        trainer.update(Control(True, 1.5, 0.5, trainer.score().entropy, 9.0))
        found[name] = {
            "records": kept,
            "selected": selected if trainer.position().tensor_parallel_rank == 0 else [],
            "left": [again, trainer.token_records(wanted)],
        }
        trainer.close()
    return found
