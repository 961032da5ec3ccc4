"""Settings of what is done about hangs: `[watchdog]`."""

from __future__ import annotations

from pydantic import Field

from stare_megatron.config.base import Section


class WatchdogConfig(Section):
    factor: float = Field(
        default=10.0,
        ge=0,
        description="A run whose ranks and engines are silent for this many times the median of their longest silence "
        "in the same phase of earlier steps hangs: it says who is at fault and ends that; ranks are started again as "
        "often as `run.restarts` says (docs/hangs.md). 0: never.",
    )
    floor: float = Field(default=120.0, gt=0, description="Silence that is no hang in any case, seconds.")
    first: float = Field(
        default=0.0,
        ge=0,
        description="Silence that is a hang while a phase has not been seen three times, seconds; 0: 1800, and 1 for "
        "each 100 MB of the model's weights.",
    )
    limit: float = Field(
        default=0.0, ge=0, description="Silence that is a hang whatever was seen before, seconds; 0: none is."
    )
