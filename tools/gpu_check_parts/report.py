"""The report: JSON for programs, text for people, both rewritten after every part."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.host.files import write_atomic
from stare_megatron.run.folder import git_state, hardware, package_versions
from tools.gpu_check_parts.runner import Result

JSON, TEXT = "report.json", "report.txt"


@dataclass(frozen=True)
class Machine:
    """What the parts ran on. `commit`: of the checkout, or ""; `dirty`: whether files differ from it."""

    hardware: str
    python: str
    packages: dict[str, str]
    commit: str
    dirty: bool
    device: str
    began: str


def machine(device: str, root: Path) -> Machine:
    commit, dirty = git_state(root)
    return Machine(
        hardware=hardware(),
        python=platform.python_version(),
        packages=package_versions(),
        commit=commit,
        dirty=dirty,
        device=device,
        began=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def write(folder: Path, about: Machine, results: list[Result], not_checked: dict[str, str]) -> None:
    """Replace both files of the report, each whole; `not_checked`: what no part looks at, and why."""
    content: dict[str, Any] = {
        "machine": dataclasses.asdict(about),
        "parts": [dataclasses.asdict(r) | {"status": r.status.value} for r in results],
        "not checked": not_checked,
    }
    write_atomic(folder / JSON, json.dumps(content, indent=1) + "\n")
    write_atomic(folder / TEXT, text(about, results, not_checked))


def text(about: Machine, results: list[Result], not_checked: dict[str, str]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about.packages.items())
    commit = f"commit {about.commit}{' with changes' if about.dirty else ''}" if about.commit else "no checkout"
    lines = [
        about.hardware,
        f"Python {about.python}; {packages}",
        f"{commit}; device {about.device}; {about.began}",
        "",
    ]
    for r in results:
        first, *rest = r.reason.split("\n")
        lines.append(f"{r.part:<18} {r.status.value:<10} {r.seconds:6.1f} s  {first}".rstrip())
        lines += [f"    {line}" for line in rest]
        lines += [f"    {line}" for line in _numbers(r.numbers)]
    lines += [f"{name:<18} not checked            {why}" for name, why in not_checked.items()]
    return "\n".join(lines) + "\n"


def _numbers(values: dict[str, Any], before: str = "") -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _numbers(value, f"{before}{name}: ")
        else:
            lines.append(f"{before}{name} {_short(value)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
