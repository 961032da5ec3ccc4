"""How the effect of a key of the configuration is seen, `test_effects.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stare_megatron.config import Config


@dataclass(frozen=True)
class Seen:
    """With `value`, `probe` gives another result than without, other keys being as in `BASE` and `beside`."""

    probe: Callable[[Config], Any]
    value: Any
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refused:
    """Only in a run, but at the door already: this value is refused with these words."""

    value: Any
    words: str
