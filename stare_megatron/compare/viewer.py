"""What `trajectories.js` reads: the sampled trajectories of the runs, within a bound on their size in the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stare_megatron.compare.samples import Sample, SampledSpan, SampledStep
from stare_megatron.compare.series import encode

# Characters of all embedded trajectories. Plotly's code alone is 4.7 million.
LIMIT = 8_000_000


def trajectories(
    samples: Mapping[str, Sequence[SampledStep]], groups: Mapping[str, int], limit: int = LIMIT
) -> dict[str, Any]:
    """JSON-like. Newest steps of every run come first until `limit` is reached; what does not fit is left out and
    counted.

    Args:
        samples: run's name -> its steps, in order.
        groups: run's name -> index of its group.
    """
    kept: dict[str, dict[int, list[dict[str, Any]]]] = {name: {} for name in samples}
    used = left_out = 0
    for name, step, sample in _newest_first(samples):
        item = _item(sample)
        size = len(json.dumps(item))
        if left_out or used + size > limit:
            left_out += 1
            continue
        used += size
        kept[name].setdefault(step, []).append(item)
    return {
        "leftOut": left_out,
        "runs": [
            {
                "name": name,
                "group": groups[name],
                "steps": [{"step": step, "items": steps[step]} for step in sorted(steps)],
            }
            for name, steps in kept.items()
            if steps
        ],
    }


def _newest_first(samples: Mapping[str, Sequence[SampledStep]]) -> Iterator[tuple[str, int, Sample]]:
    for back in range(1, max((len(steps) for steps in samples.values()), default=0) + 1):
        for name, steps in samples.items():
            if back <= len(steps):
                for sample in steps[-back].samples:
                    yield name, steps[-back].step, sample


def _item(sample: Sample) -> dict[str, Any]:
    several = len({version for span in sample.spans for version in span.versions}) > 1
    return vars(sample) | {
        "turns": [{"calls": [vars(call) for call in turn.calls], "void": turn.void} for turn in sample.turns],
        "spans": [_span(span, versions=several) for span in sample.spans],
    }


def _span(span: SampledSpan, *, versions: bool) -> dict[str, Any]:
    columns = {name: encode(_float32(values)) for name, values in span.columns.items()}
    if versions and span.versions:  # one that is the same everywhere is among the facts of the sample
        columns["versions"] = encode(np.array(span.versions, "<f8"))
    return {"kind": span.kind, "pieces": list(span.pieces), "ids": encode(np.array(span.token_ids, "<f8")), **columns}


def _float32(values: Sequence[float | None]) -> np.ndarray:
    """Numbers that were float32 when they were written, which their few digits mean exactly."""
    return np.array([np.nan if v is None else v for v in values], "<f4").astype("<f8")
