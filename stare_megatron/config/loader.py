"""Reading a configuration: a TOML file, overridden on the command line by `key.sub=value`."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stare_megatron.config.base import Section, section_of
from stare_megatron.config.config import Config
from stare_megatron.errors import UserError


def load(path: Path, overrides: list[str]) -> Config:
    """Read a TOML file and apply `key.sub=value` overrides (values are TOML; a bare word is a string).

    Relative paths in the file are resolved against the current directory.

    Raises:
        UserError: unreadable file, malformed TOML, unknown key, wrong value.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: cannot read the configuration: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # no UTF-8 and numbers of thousands of digits among them
        raise UserError(f"{path}: not valid TOML: {e}") from e
    for item in overrides:
        _override(tree, item)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    """Validate a nested mapping; `origin` names it in errors."""
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
        return Config.model_validate(tree)
    except UnicodeEncodeError as e:
        raise UserError(f"{origin}: {e.object[max(0, e.start - 20) : e.end]!r} is not UTF-8 text") from e
    except RecursionError as e:
        raise UserError(f"{origin}: nested too deep") from e
    except ValidationError as e:
        raise UserError(_explain(e, origin)) from e


def _override(tree: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    parts = key.strip().split(".")
    if not eq or not all(parts):
        raise UserError(f"command line: {item!r} is not key.sub=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"command line: {item!r}: {part!r} is a value, not a table")
    node[parts[-1]] = value


def all_keys() -> dict[str, str]:
    """Every dotted key with its description, in order."""
    found: dict[str, str] = {}

    def walk(model: type[Section], prefix: str) -> None:
        for name, field in model.model_fields.items():
            kind = section_of(field.annotation)
            if kind is None or kind is not field.annotation:
                found[prefix + name] = field.description or ""
            if kind is not None:
                walk(kind, f"{prefix}{name}.")

    walk(Config, "")
    return found


def _explain(error: ValidationError, origin: str) -> str:
    """The first fault, as one line."""
    first = error.errors()[0]
    key = ".".join(part for part in first["loc"] if isinstance(part, str))
    if first["type"] == "extra_forbidden":
        keys = all_keys()
        tables = {k.rpartition(".")[0] for k in keys}
        near = difflib.get_close_matches(key, [*keys, *tables], n=1, cutoff=0.5)
        if not near:
            leaf = {k.rpartition(".")[2]: k for k in keys}
            near = [leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], leaf, n=1)]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{origin}: unknown key {key!r}{hint}"
    if first["type"] == "missing":
        return f"{origin}: key {key!r} is missing: {all_keys().get(key, 'a table is required')}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "value_error" else f" = {first['input']!r}"
    return f"{origin}: {key}{value}: {message}" if key else f"{origin}: {message}"
