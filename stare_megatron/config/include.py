"""Files that a run's file includes, and where each value came from.

    include = ["../base/long_cot.toml"]     # relative to the file that says it; later files win, the file itself most

Tables are merged key by key; a list is a value, and is replaced whole.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError

KEY = "include"
COMMAND_LINE = "command line"
_Parts = tuple[str, ...]


@dataclass
class Source:
    """A tree of tables. `origin`: the file it is known by; `files`: by the parts of a key, where its value is from."""

    origin: str
    tree: dict[str, Any] = field(default_factory=dict)
    files: dict[_Parts, str] = field(default_factory=dict)

    def of(self, parts: Sequence[str]) -> str:
        """Where a value, or the table it is in, is from; `origin` where several files share it or none has it."""
        key = tuple(parts)
        for length in range(len(key), 0, -1):
            if key[:length] in self.files:
                return self.files[key[:length]]
        below = {file for known, file in self.files.items() if key and known[: len(key)] == key}
        return below.pop() if len(below) == 1 else self.origin

    def put(self, parts: _Parts, value: Any, file: str) -> None:
        """Set a value, or merge a table into what is there.

        Raises:
            UserError: a table where there is a value, or the other way round.
        """
        node = self.tree
        for depth, part in enumerate(parts[:-1], 1):
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise UserError(_clash(parts[:depth], file, "a table", self.of(parts[:depth]), "a value"))
        there = node.get(parts[-1])
        if isinstance(value, dict):
            if parts[-1] in node and not isinstance(there, dict):
                raise UserError(_clash(parts, file, "a table", self.of(parts), "a value"))
            node.setdefault(parts[-1], {})
            for name, inner in value.items():
                self.put((*parts, name), inner, file)
            if not value and not there:
                self.files[parts] = file
            return
        if isinstance(there, dict) and there:
            raise UserError(_clash(parts, file, "a value", self.of(parts), "a table"))
        node[parts[-1]] = value
        self.files[parts] = file


def _clash(parts: Iterable[str], file: str, kind: str, other: str, other_kind: str) -> str:
    return f"{file}: {'.'.join(parts)} is {kind}, in {other} it is {other_kind}; make them the same"


def read(path: Path) -> Source:
    """A TOML file with all that it includes.

    Raises:
        UserError: unreadable file, malformed TOML, files that include each other, a value where another has a table.
    """
    source = Source(str(path))
    _merge(source, path, ())
    return source


def _merge(source: Source, path: Path, chain: tuple[Path, ...]) -> None:
    tree = _tree(path)
    included = tree.pop(KEY, [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: {KEY} = {included!r:.200}: must be a file or a list of files, relative to this one")
    chain = (*chain, path)
    for name in names:
        target = _beside(path, name)
        known = [file.resolve() for file in chain]
        if target.resolve() in known:
            circle = " -> ".join(str(file) for file in (*chain[known.index(target.resolve()) :], target))
            raise UserError(f"{path}: {KEY} = {name!r}: the files include each other ({circle}); take one out")
        if not target.is_file():
            raise UserError(f"{path}: {KEY} = {name!r}: there is no file {target}; it is relative to {path.parent}")
        _merge(source, target, chain)
    for name, value in tree.items():
        source.put((name,), value, str(path))


def _beside(path: Path, name: str) -> Path:
    return Path(os.path.normpath(path.parent / os.path.expanduser(os.path.expandvars(name))))


def _tree(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as e:
        cure = ""
        if isinstance(e, FileNotFoundError):
            cure = "; give the path of a TOML file, or start from one that `stare-megatron example` prints"
        elif isinstance(e, IsADirectoryError):
            there = ", ".join(sorted(file.name for file in path.glob("*.toml")))
            cure = f"; name a file in it: {there}" if there else "; give the path of a TOML file"
        raise UserError(f"{path}: cannot read the configuration: {e.strerror}{cure}") from e
    except (ValueError, RecursionError) as e:  # no UTF-8 and numbers of thousands of digits among them
        raise UserError(f"{path}: not valid TOML: {e}") from e
