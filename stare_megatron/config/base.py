"""What every table of the configuration is."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

T = TypeVar("T")
FREE_ON_RESUME = "free on resume"
# The type of a key or table that may differ from the checkpoint's when a run is resumed: it does not change what is
# trained, or is compared by its content. Every other key does: so does one that is added later.
Free = Annotated[T, FREE_ON_RESUME]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, tree: Any) -> Any:
        """`train = "a.jsonl"` says `train = ["a.jsonl"]`."""
        lists = {key for key, f in cls.model_fields.items() if typing.get_origin(f.annotation) is list}
        if not isinstance(tree, dict) or not lists:
            return tree
        return {k: [v] if k in lists and isinstance(v, str | Path) else v for k, v in tree.items()}


def section_of(annotation: Any) -> type[Section] | None:
    """The model of a table, or of each table of a list; None for other fields."""
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted key -> value, in their order; empty tables are left out."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _writable(value: Any) -> Any:
    """Raises:
    ValueError: a value that `config.toml` cannot hold, or would give back as another."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _writable(inner)
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"holds {value!r}; want text, finite numbers, true, false, and lists and tables of them")
    return value


PassThrough = Annotated[dict[str, Any], AfterValidator(_writable)]  # keys are those of a library
