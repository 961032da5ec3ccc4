"""Keys and methods in words: for `stare-megatron config` and `methods`, and for docs/configuration.md."""

from __future__ import annotations

import ast
import types
import typing
from pathlib import Path

from pydantic.fields import FieldInfo

from stare_megatron.config.base import Section, section_of
from stare_megatron.config.config import Config
from stare_megatron.config.loader import hint, walk
from stare_megatron.config.methods import METHODS
from stare_megatron.config.registry import Choice
from stare_megatron.config.sft import SftConfig
from stare_megatron.errors import UserError

_NAMES = {str: "string", int: "integer", float: "number", bool: "true or false", Path: "path"}


def describe(name: str) -> str:
    """Meaning, type and default of a key, of every key of a table, or, for "", the tables.

    Raises:
        UserError: no such key or table.
    """
    own = [key for key in walk(root=SftConfig) if key.name.startswith("sft.")]
    keys = {key.name: key.field for key in [*walk(), *own]}
    if not name:
        tables = Config.model_fields | {"sft": SftConfig.model_fields["sft"]}
        return "\n".join(f"[{table}]  {field.description}" for table, field in tables.items())
    found = [key for key in keys if key == name or key.startswith(f"{name}.")]
    if not found:
        raise UserError(f"no key or table {name!r}{hint(name)}")
    lines = []
    for key in found:
        default = default_of(keys[key])
        value = f"{type_name(keys[key].annotation)}; {'' if default == 'required' else 'default '}{default}"
        lines.append(f"{key} ({value.replace('`', '')})\n    {keys[key].description}")
    return "\n".join(lines)


def methods() -> dict[str, str]:
    """What each method is, in one line: the first of its loss's file."""
    folder = Path(__file__).parents[1] / "algo" / "losses"
    docs = {name: ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or "" for name in METHODS}
    return {name: doc.partition("\n")[0] for name, doc in docs.items()}


def models_to(table: str) -> list[type[Section]]:
    """The models from the root to the one of `table`."""
    found: list[type[Section]] = [Config]
    for name in table.split(".") if table else ():
        if name not in found[-1].model_fields and issubclass(found[-1], Choice):  # of what the table names
            found[-1] = next(section for section in found[-1].sections(None) if name in section.model_fields)
        model = section_of(found[-1].model_fields[name].annotation)
        assert model is not None, f"{table} is no table"
        found.append(model)
    return found


def type_name(annotation: object) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin is list and section_of(annotation) is not None:
        return "list of paths or tables"
    if origin is list:
        return f"list of {type_name(args[0])}s"
    if origin is dict:
        return "table"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in args)
    assert isinstance(annotation, type), f"no name for the type {annotation}"
    return _NAMES[annotation]


def default_of(field: FieldInfo) -> str:
    """In words; `required` where there is none."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "empty" if value in ("", [], {}) else f"`{value}`"
