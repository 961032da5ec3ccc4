"""What was measured in the parts of a step, as metrics: the catalogue's reduction of each name, applied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stare_megatron.metrics.catalogue import Metric, Reduction, entry, metrics
from stare_megatron.types import Measured


def reduce(measured: Iterable[Measured]) -> tuple[Metric, ...]:
    """The parts of each name as one value, by the catalogue's reduction; names in the order of their first parts.

    Raises:
        ValueError: a name is not in the catalogue, or its parts are none that its reduction takes.
    """
    parts: dict[str, list[Measured]] = {}
    for part in measured:
        parts.setdefault(part.name, []).append(part)
    return metrics({name: _reduced(entry(name).reduction, found) for name, found in parts.items()})


def _reduced(by: Reduction, parts: Sequence[Measured]) -> float:
    if by in (Reduction.MEAN, Reduction.TOKEN_MEAN, Reduction.FRACTION):
        weight = sum(part.weight for part in parts)
        return sum(part.total for part in parts) / weight if weight else 0.0 if by is Reduction.FRACTION else math.nan
    if by is Reduction.UPDATE_MEAN:
        return sum(part.value for part in parts) / len(parts)
    if any(part.weight != 1 for part in parts) or (by is Reduction.ONE and len(parts) > 1):
        raise ValueError(f"metric {parts[0].name}: {parts} are no parts of: {by.value}")
    totals = [part.total for part in parts]
    if by in (Reduction.SUM, Reduction.UPDATE_SUM):
        return sum(totals)
    return totals[-1] if by in (Reduction.ONE, Reduction.LAST) else max(totals)
