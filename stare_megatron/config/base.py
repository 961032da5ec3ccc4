"""What every table of the configuration is."""

from __future__ import annotations

import math
import typing
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def section_of(annotation: Any) -> type[Section] | None:
    """The model of a table, or of each table of a list; None for other fields."""
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _writable(value: Any) -> Any:
    """Raises:
    ValueError: a value that `config.toml` cannot hold, or would give back as another."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _writable(inner)
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"holds {value!r}; want text, finite numbers, true, false, and lists and tables of them")
    return value


OpenTable = Annotated[dict[str, Any], AfterValidator(_writable)]  # keys are those of a library
