"""What property tests share: how many examples, and values that programs stumble on."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# `make fuzz` tries so many times as many, `make test-unit` a third.
_FACTOR = float(os.environ.get("STARE_FUZZ", "1"))


def bounded(examples: int) -> settings:
    """The same examples in every run; no time limit an example, for CI has slow moments."""
    checks = list(HealthCheck)
    return settings(
        max_examples=max(1, round(examples * _FACTOR)),
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
    )


# Half surrogates come from JSON escapes and from names that are not UTF-8.
ODD_TEXT = st.sampled_from(
    ["", " ", "\x00", "a\nb", "\ud83d", "\ufeff", "nan", "1e999", "é", "\u2028", "😀", "~", "%s{}"]
)
TEXT = st.text(st.characters(), max_size=20) | ODD_TEXT
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 1, 2**31, 2**63, 0.5])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT


def nested(scalars: st.SearchStrategy[Any], leaves: int = 6) -> st.SearchStrategy[Any]:
    """These, and lists and dictionaries of them."""
    return st.recursive(
        scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=leaves
    )
