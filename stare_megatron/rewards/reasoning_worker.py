"""A process that scores by reasoning-gym, whose scorers evaluate what a policy wrote: see `workers.py`, `child.py`."""

from __future__ import annotations

from typing import Any

from stare_megatron.rewards import child
from stare_megatron.tasks import reasoning


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One request of `reasoning.py`."""
    score = reasoning.verify(request["answer"], request["response"])
    return {"correct": score.correct, "note": score.note}


if __name__ == "__main__":
    reasoning.datasets()  # its import is not on the clock
    child.serve(answer)
