"""Who is told how long actors are silent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from stare_megatron.errors import RunError


class Watch(Protocol):
    """Of a silence. `what`: the actors are doing; `silence`: seconds without an answer from any that is waited for."""

    def answered(self, what: str, silence: float) -> None:
        """One of them answered."""
        ...

    def look(self, late: Sequence[str], what: str, silence: float) -> None:
        """Those named have not. Raises: RunError: that is too long."""
        ...

    def timed_out(self, late: Sequence[str], what: str, silence: float) -> RunError:
        """What to raise when a wait's own limit is reached."""
        ...


class NoWatch:
    """Of actors that start or answer within seconds."""

    def answered(self, what: str, silence: float) -> None: ...

    def look(self, late: Sequence[str], what: str, silence: float) -> None: ...

    def timed_out(self, late: Sequence[str], what: str, silence: float) -> RunError:
        return RunError(f"{', '.join(late)}: no answer within {silence:.0f} s ({what})")


NO_WATCH: Watch = NoWatch()
