"""What every table of the configuration is."""

from __future__ import annotations

import typing
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")
FREE_ON_RESUME = "free on resume"
# The type of a key or table that may differ from the checkpoint's when a run is resumed: it does not change what is
# trained, or is compared by its content. Every other key does: so does one that is added later.
Free = Annotated[T, FREE_ON_RESUME]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def section_of(annotation: Any) -> type[Section] | None:
    """The model of a table, or of each table of a list; None for other fields."""
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None
