"""Reading a configuration: a TOML file, overridden on the command line by `key.sub=value`."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo

from stare_megatron.config import include
from stare_megatron.config.base import FREE_ON_RESUME, Section, section_of
from stare_megatron.config.cluster import ClusterConfig
from stare_megatron.config.config import Config
from stare_megatron.config.include import COMMAND_LINE, Source
from stare_megatron.config.methods import METHODS
from stare_megatron.config.registry import Choice, OpenTable
from stare_megatron.config.sft import SftConfig
from stare_megatron.errors import UserError, nearest, suggest

Root = TypeVar("Root", Config, SftConfig)

# What others call a key, by its last part.
_SYNONYMS = {
    "clip_ratio": "algorithm.clip_low algorithm.clip_high",
    "learning_rate": "trainer.optimizer.lr",
    "batch_size": "rollout.prompts_per_step",
    "num_generations": "rollout.group_size",
    "max_tokens": "rollout.max_response_tokens",
    "save_every": "checkpoint.every",
    "epochs": "run.steps",
    "tp": "trainer.tensor_parallel inference.tensor_parallel",
}
# pydantic's type of an error, or its first word -> what the value must be.
_MUST = {
    "bool": "be true or false",
    "dict": "be a table",
    "finite": "be a finite number",
    "float": "be a number",
    "greater_than": "be above {gt}",
    "greater_than_equal": "be at least {ge}",
    "int": "be a whole number",
    "less_than": "be below {lt}",
    "less_than_equal": "be at most {le}",
    "list": 'be a list, e.g. ["a", "b"]',
    "literal": "be {expected}",
    "model": "be a table",
    "path": "be a path, in quotes",
    "string_pattern_mismatch": "match {pattern}",
    "string_too_short": "not be empty",
    "string_too_long": "have at most {max_length} characters",
    "string": "be a string, in quotes",
    "too_short": "have at least {min_length} entry",
}


def load(path: Path, overrides: list[str]) -> Config:
    """Read a TOML file, with what its `include` names, and apply `key.sub=value` overrides (values are TOML; a bare
    word is a string).

    Relative paths in the file are resolved against the current directory, those of `include` against the file.

    Raises:
        UserError: unreadable file, malformed TOML, unknown key, wrong value.
    """
    return _read(path, overrides, Config)


def load_sft(path: Path, overrides: list[str]) -> SftConfig:
    """As `load`, for supervised training."""
    return _read(path, overrides, SftConfig)


def load_run(path: Path, overrides: list[str]) -> Config | SftConfig:
    """As `load`, of either kind of run: a table `[sft]` makes it supervised training."""
    source = include.read(path)
    for item in overrides:
        _override(source, item)
    return _parsed(source, SftConfig) if "sft" in source.tree else _parsed(source, Config)


def _read(path: Path, overrides: list[str], root: type[Root]) -> Root:
    source = include.read(path)
    _check_kind(path, source.tree, root)
    for item in overrides:
        _override(source, item)
    return _parsed(source, root)


def _check_kind(path: Path, tree: Mapping[str, Any], root: type[Root]) -> None:
    """Raises: UserError: the file is one of the other command, of which every key would be called unknown."""
    supervised = "sft" in tree
    others = [table for table in ("reward", "rollout", "algorithm") if table in tree]
    if root is Config and supervised and not others:
        raise UserError(f"{path}: [sft] is of supervised training; its command is `sft`, not `train` or `eval`")
    if root is SftConfig and others and not supervised:
        raise UserError(f"{path}: [{others[0]}] is of a run that samples; its command is `train`, not `sft`")


class _Alone(Section):
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)


def cluster_alone(overrides: list[str]) -> ClusterConfig:
    """`[cluster]` without a run's file, of overrides of it.

    Raises:
        UserError: as `load`.
    """
    source = Source(COMMAND_LINE)
    for item in overrides:
        _override(source, item)
    _check_text(source.tree, source.origin)
    try:
        return _Alone.model_validate(source.tree).cluster
    except ValidationError as e:
        raise UserError(_explain(e, source)) from e


def parse(tree: dict[str, Any], origin: str) -> Config:
    """Validate a nested mapping; `origin` names it in errors."""
    return _parsed(Source(origin, tree), Config)


def parse_sft(tree: dict[str, Any], origin: str) -> SftConfig:
    """As `parse`, for supervised training."""
    return _parsed(Source(origin, tree), SftConfig)


def _parsed(source: Source, root: type[Root]) -> Root:
    _check_text(source.tree, source.origin)
    try:
        return root.model_validate(source.tree)
    except RecursionError as e:
        raise UserError(f"{source.origin}: nested too deep") from e
    except ValidationError as e:
        raise UserError(_explain(e, source, root)) from e
    except UserError as e:  # of an object that the configuration names
        raise UserError(f"{source.origin}: {e}") from e


def _check_text(tree: dict[str, Any], origin: str) -> None:
    """Raises: UserError: what could not be printed or written again."""
    try:
        json.dumps(tree, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as e:
        raise UserError(f"{origin}: {e.object[max(0, e.start - 20) : e.end]!r} is not UTF-8 text") from e
    except RecursionError as e:
        raise UserError(f"{origin}: nested too deep") from e
    except ValueError as e:  # Python's own limit
        raise UserError(f"{origin}: holds a number of thousands of digits") from e


def _override(source: Source, item: str) -> None:
    key, eq, text = item.partition("=")
    parts = key.strip().split(".")
    if not eq or not all(parts):
        raise UserError(f"{COMMAND_LINE}: {item!r} is not key.sub=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        value = text
    node = source.tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"{COMMAND_LINE}: {item!r}: {part!r} is a value, not a table")
    node[parts[-1]] = value
    source.files[tuple(parts)] = COMMAND_LINE


@dataclass(frozen=True)
class Key:
    """A key of the configuration. `free`: a resumed run may have another value there."""

    name: str
    field: FieldInfo
    free: bool

    @property
    def default(self) -> Any:
        """None where there is none."""
        return None if self.field.is_required() else self.field.get_default(call_default_factory=True)


def walk(tree: Mapping[str, Any] | None = None, root: type[Section] = Config) -> Iterator[Key]:
    """Every key, dotted, in order. What a table's `name` decides: the keys of the objects that `tree` names; without
    one, of all registered ones. `root`: `Config` or `SftConfig`."""
    return _walk(root, tree, "", free=False)


def _walk(model: type[Section], tree: Mapping[str, Any] | None, prefix: str, *, free: bool) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        held = free or FREE_ON_RESUME in field.metadata
        if field.annotation is Section and issubclass(model, Choice):
            inner = prefix if issubclass(model, OpenTable) else f"{prefix}{name}."
            for section in model.sections(tree):
                yield from _walk(section, {}, inner, free=held)
            continue
        kind = section_of(field.annotation)
        if kind is None or kind is not field.annotation:
            yield Key(prefix + name, field, held)
        if kind is not None:
            below = {} if tree is None else tree.get(name, {})
            node = None if tree is None else below if isinstance(below, Mapping) else {}
            yield from _walk(kind, node, f"{prefix}{name}.", free=held)


def all_keys(tree: Mapping[str, Any] | None = None, root: type[Section] = Config) -> dict[str, str]:
    """Every dotted key with its description, in order; `tree` and `root` as in `walk`."""
    return {key.name: key.field.description or "" for key in walk(tree, root)}


def _explain(error: ValidationError, source: Source, root: type[Section] = Config) -> str:
    """The first fault, as one line; a key that is not known comes before one that is missing, which it may be."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    parts = [part for part in first["loc"] if isinstance(part, str)]
    key, tree = ".".join(parts), source.tree
    origin = source.origin if first["type"] == "missing" else source.of(parts)
    if first["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key!r}{hint(key, tree, root)}"
    if first["type"] == "missing":
        return f"{origin}: key {key!r} is missing: {all_keys(tree, root).get(key, 'a table is required')}"
    message = wanted(first)
    if first["type"] == "literal_error":
        choices = first.get("ctx", {})["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        message += suggest(first["input"], choices) if isinstance(first["input"], str) else ""
    value = "" if first["type"] == "value_error" else f" = {first['input']!r:.200}"
    return f"{origin}: {key}{value}: {message}" if key else f"{origin}: {message}"


def wanted(error: Any) -> str:
    """What is wrong with a value, by pydantic's account of it."""
    must = _MUST.get(error["type"]) or _MUST.get(error["type"].partition("_")[0])
    return "must " + must.format(**error.get("ctx", {})) if must else error["msg"].removeprefix("Value error, ")


def hint(key: str, tree: Mapping[str, Any] | None = None, root: type[Section] = Config) -> str:
    """What an unknown key may have meant: one or two of that name elsewhere, or one of its table that is near."""
    table, _, name = key.rpartition(".")
    if table == "algorithm" and name in METHODS:
        common = ", ".join(sorted(METHODS[name].uses))
        return f"; {name} has no table of its own, its settings are keys of [algorithm]: {common}"
    keys = all_keys(tree, root)
    every = dict.fromkeys([*keys, *(k.rpartition(".")[0] for k in keys)])
    named: dict[str, list[str]] = {}
    for k in every:
        named.setdefault(k.rpartition(".")[2], []).append(k)
    beside = {n: k for n, keys in named.items() for k in keys if k.rpartition(".")[0] == table}
    elsewhere = " ".join(named.get(name, [])) if len(named.get(name, [])) <= 2 else ""
    return suggest(
        name,
        (),
        {name: (_SYNONYMS.get(name) if root is Config else "") or elsewhere or beside.get(nearest(name, beside), "")},
    )
