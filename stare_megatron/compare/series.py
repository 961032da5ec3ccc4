"""Series of numbers as the report's page holds them; `decode` in report.js reads them."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np


def encode(values: np.ndarray) -> dict[str, Any]:
    """A float64 series, exactly: `{"c": value, "n": count}` if constant (None: NaN), else base64 of the smallest type
    that holds every value, `{"d": "i1" | "i2" | "i4" | "f4" | "f8", "b": text}`, little-endian."""
    if np.isnan(values).all():
        return {"c": None, "n": len(values)}
    if np.isfinite(values[0]) and (values == values[0]).all():
        return {"c": float(values[0]), "n": len(values)}
    for kind in ("i1", "i2", "i4", "f4"):
        with np.errstate(invalid="ignore", over="ignore"):
            narrow = values.astype(f"<{kind}")
            if np.array_equal(narrow.astype("<f8"), values, equal_nan=kind == "f4"):
                break
    else:
        kind, narrow = "f8", values.astype("<f8")
    return {"d": kind, "b": base64.b64encode(narrow.tobytes()).decode()}
