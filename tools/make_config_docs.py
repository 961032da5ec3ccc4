"""Write docs/configuration.md from the configuration's models: `python tools/make_config_docs.py`."""

from __future__ import annotations

import types
import typing
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stare_megatron.config import Config, Section, section_of
from stare_megatron.config.loader import walk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

_HEAD = """# Configuration

A run is one TOML file. Any key can be set on the command line, after the file, as `key.sub=value`; values are TOML, a
bare word is a string. An unknown key is an error that names the nearest one. Relative paths start at the current
directory.

    stare-megatron train run.toml rollout.group_size=16 run.name=wider
    stare-megatron train run.toml --print-config

The tables `[trainer.megatron]` and `[inference.vllm]` take further fields of Megatron-Core's `TransformerConfig` and of
vLLM's `EngineArgs` by their upstream names, checked against the installed packages. Fields that have a key here, or
that the checkpoint or the run decides, are refused there.

Written by `python tools/make_config_docs.py` from `stare_megatron/config.py`.
"""


def page() -> str:
    """The whole page."""
    tables: dict[str, list[str]] = {}
    for key in walk():
        section, _, name = key.name.rpartition(".")
        meaning = _cell(key.field.description or "")
        line = f"| `{name}` | {_type(key.field.annotation)} | {_default(key.field)} | {meaning} |"
        tables.setdefault(section, []).append(line)
    parts = [_HEAD]
    for section, lines in tables.items():
        title = f"[{section}]" if _one_table(section) else f"[[{section}]]"
        parts.append(f"\n## {title}\n\n{_about(section)}\n\n| key | type | default | meaning |\n|---|---|---|---|\n")
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def _models(section: str) -> list[type[Section]]:
    """The models from the root to the one of `section`."""
    found: list[type[Section]] = [Config]
    for name in section.split("."):
        model = section_of(found[-1].model_fields[name].annotation)
        if model is None:
            raise TypeError(f"{section} is no section")
        found.append(model)
    return found


def _one_table(section: str) -> bool:
    return isinstance(_field(section).annotation, type) if "." in section else True


def _about(section: str) -> str:
    parent = _models(section)[-2]
    return parent.model_fields[section.rpartition(".")[2]].description or ""


def _field(key: str) -> FieldInfo:
    section, _, name = key.rpartition(".")
    return _models(section)[-1].model_fields[name]


def _type(annotation: object) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin is list and section_of(annotation) is not None:
        return "list of paths or tables"
    if origin is list:
        return f"list of {_type(args[0])}s"
    if origin is dict:
        return "table"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in args)
    names = {str: "string", int: "integer", float: "number", bool: "true or false", Path: "path"}
    if not isinstance(annotation, type) or annotation not in names:
        raise TypeError(f"no name for the type {annotation}")
    return names[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        raise TypeError("a field without a default must be required")
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | dict | str):
        return "empty" if not value else f"`{value}`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
