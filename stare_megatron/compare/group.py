"""Groups: runs that differ only in their seed; and the settings in which groups differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.compare.load import Run, Setting

# Where a run writes, what it logs and saves, and where it runs do not change what it learns.
IGNORED_KEYS = ("run.name", "run.seed", "run.dir", "run.resume", "run.min_free_mb", "data.date")
IGNORED_SECTIONS = ("logging.", "checkpoint.", "cluster.")


@dataclass(frozen=True)
class Group:
    """Runs with the same settings but for the seed. `label`: short and unique; `settings`: those they share."""

    label: str
    runs: tuple[Run, ...]
    settings: Mapping[str, Setting]


def group(runs: Sequence[Run], ignore: Sequence[str] = ()) -> list[Group]:
    """Groups in the order of their first runs.

    The label is the runs' name without the seed (`stare-s1`, `stare-s2`: `stare`) where all runs of the group agree
    on it and no other group has it, else the run's name (one run) or the settings the group differs in. A run of
    unknown settings is a group of its own.

    Args:
        ignore: further keys, or sections ending in a dot, that do not part groups.
    """
    found: dict[object, list[Run]] = {}
    kept: dict[object, dict[str, Setting]] = {}
    for index, run in enumerate(runs):
        settings = {k: _short_path(v) for k, v in run.settings.items() if not _ignored(k, ignore)}
        key: object = json.dumps(settings, sort_keys=True) if settings else index
        found.setdefault(key, []).append(run)
        kept[key] = settings
    plain = [Group("", tuple(members), kept[key]) for key, members in found.items()]
    labels = _labels(plain)
    return [Group(label, g.runs, g.settings) for label, g in zip(labels, plain, strict=True)]


def differing(groups: Sequence[Group]) -> dict[str, list[Setting | None]]:
    """Key -> value in each group, for keys on which groups do not agree; None where a group lacks the key."""
    known = [g for g in groups if g.settings]
    keys = dict.fromkeys(key for g in known for key in g.settings)
    return {
        key: [g.settings.get(key) for g in groups]
        for key in keys
        if len({json.dumps(g.settings.get(key)) for g in known}) > 1
    }


def seed(run: Run) -> int | None:
    """`run.seed`; None when not known."""
    value = run.settings.get("run.seed")
    return value if isinstance(value, int) else None


def _ignored(key: str, more: Sequence[str]) -> bool:
    names = (*IGNORED_KEYS, *IGNORED_SECTIONS, *more)
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def _short_path(value: Setting) -> Setting:
    """A path by its last two parts, also in a list, so that the same files in another place are the same setting."""
    if not isinstance(value, str):
        return value
    if value.startswith("[") and value.endswith("]"):
        try:
            items = json.loads(value)
        except ValueError:
            return value
        return json.dumps([_short_path(item) if isinstance(item, str) else item for item in items])
    return "/".join(value.rstrip("/").split("/")[-2:]) if value.count("/") > 1 else value


def _labels(groups: Sequence[Group]) -> list[str]:
    stems = [_stem(g.runs) for g in groups]
    described = _describe(groups)
    labels = []
    for g, stem, text in zip(groups, stems, described, strict=True):
        if stem and stems.count(stem) == 1:
            labels.append(stem)
        elif len(g.runs) == 1:
            labels.append(g.runs[0].name)
        else:
            labels.append(text or stem or g.runs[0].name)
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[:i].count(label) + 1})"
        for i, label in enumerate(labels)
    ]


def _stem(runs: Sequence[Run]) -> str:
    """The name that all runs share once each has lost its own seed; "" if they do not agree."""
    names = set()
    for run in runs:
        number = seed(run)
        name = run.name if number is None else re.sub(rf"[-_.]?(seed|s)?[-_.]?0*{number}$", "", run.name)
        names.add(name or run.name)
    return names.pop() if len(names) == 1 else ""


def _describe(groups: Sequence[Group]) -> list[str]:
    """The method, and what else the group differs in, as `key=value`."""
    settings = differing(groups)
    texts = []
    for i, g in enumerate(groups):
        method = g.settings.get("algorithm.method")
        parts = [method] if isinstance(method, str) else []
        parts += [f"{k.rpartition('.')[2]}={v[i]}" for k, v in settings.items() if k != "algorithm.method"]
        texts.append(", ".join(parts[:4]))
    return texts
