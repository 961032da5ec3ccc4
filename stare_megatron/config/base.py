"""What every table of the configuration is."""

from __future__ import annotations

import contextlib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Le, Lt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from stare_megatron.host.paths import absolute

T = TypeVar("T")
FREE_ON_RESUME = "free on resume"
# The type of a key or table that may differ from the checkpoint's when a run is resumed: it does not change what is
# trained, or is compared by its content. Every other key does: so does one that is added later.
Free = Annotated[T, FREE_ON_RESUME]
Text = Annotated[str, Field(min_length=1)]

# Bounds of numbers whose key sets none: what fits the integers and the float32 of every library below.
INTEGERS = 2**31
LARGEST, SMALLEST = 1e9, 1e-30


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """A ValueError in here is about the value alone: the message names the key and shows what was written."""
    try:
        yield
    except ValueError as e:
        raise PydanticCustomError("as_written", "{why}", {"why": str(e)}) from e


class Section(BaseModel):
    """Strings, numbers and paths are read alike in all of them, those of a user's own objects included."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """`train = "a.jsonl"` says `train = ["a.jsonl"]`; paths are made absolute."""
        kind = _kind(cls.model_fields[str(info.field_name)].annotation)
        with explained():
            return _list(value, *typing.get_args(kind)) if typing.get_origin(kind) is list else _single(value, kind)

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any, info: ValidationInfo) -> Any:
        """Also what was a number in quotes."""
        field = cls.model_fields[str(info.field_name)]
        with explained():
            _check_number(value, _kind(field.annotation), field)
        return value


def _kind(annotation: Any) -> Any:
    """The type of a field, without the None of one that may be left out."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        others = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
        annotation = others[0] if len(others) == 1 else annotation
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _list(value: Any, kind: Any) -> Any:
    """Raises: ValueError: an entry that is empty, or there twice."""
    entries = [value] if isinstance(value, str | Path) else value
    if kind not in (str, Path) or not isinstance(entries, list):
        return entries
    if kind is Path:
        entries = [absolute(entry) if isinstance(entry, str | Path) else entry for entry in entries]
    if "" in entries:
        raise ValueError("has an empty entry; take it out")
    if twice := [str(entry) for n, entry in enumerate(entries) if entry in entries[:n]]:
        raise ValueError(f"has {twice[0]!r} twice; take one out")
    return entries


def _single(value: Any, kind: Any) -> Any:
    """Raises: ValueError: no path, NUL in a text, true or false for a number."""
    if kind is Path and isinstance(value, str | Path):
        return absolute(value)
    if isinstance(value, str) and "\0" in value:
        raise ValueError("must not hold the character NUL")
    if kind in (int, float) and isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _check_number(value: Any, kind: Any, field: FieldInfo) -> None:
    """Raises: ValueError: a number that libraries cannot hold."""
    if kind not in (int, float) or not isinstance(value, int | float):
        return
    if not any(isinstance(bound, Le | Lt) for bound in field.metadata):
        if kind is int and abs(value) >= INTEGERS:
            raise ValueError(f"must be below {INTEGERS}")
        if kind is float and LARGEST < abs(value) < math.inf:
            raise ValueError(f"must be at most {LARGEST:g}")
    if kind is float and 0 < abs(value) < SMALLEST:
        raise ValueError(f"must be 0, or at least {SMALLEST:g} in size")


def compiled(key: str, pattern: str) -> re.Pattern[str]:
    """The expression, in which `.` is any character.

    Raises:
        ValueError: it is none; names the key.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as e:
        why = str(e).replace("\n", " ")
        raise ValueError(f"{key} = {pattern!r:.200} is no regular expression: {why}") from e


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
