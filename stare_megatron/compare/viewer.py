"""What `trajectories.js` reads: the sampled trajectories of the runs, within a bound on their size in the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stare_megatron.compare.samples import Sample, SampledSpan, SampledStep

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
    return {
        "prompt": sample.prompt,
        "sample": sample.sample,
        "reward": sample.reward,
        "facts": sample.facts,
        "answer": sample.answer,
        "note": sample.note,
        "advantage": sample.advantage,
        "turns": [{"calls": [vars(call) for call in turn.calls], "void": turn.void} for turn in sample.turns],
        "spans": [_span(span) for span in sample.spans],
    }


def _span(span: SampledSpan) -> dict[str, Any]:
    packed = {name: _packed(values) for name, values in span.columns.items()}
    ids = {"d": "i4", "b": _base64(np.array(span.token_ids, "<i4"))}
    return {"kind": span.kind, "pieces": list(span.pieces), "ids": ids, **packed}


def _packed(values: Sequence[float | None]) -> dict[str, Any]:
    """As `html.encode`, of numbers that were float32 when they were written: exact."""
    array = np.array([np.nan if v is None else v for v in values], "<f4")
    return {"d": "f4", "b": _base64(array)}


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
