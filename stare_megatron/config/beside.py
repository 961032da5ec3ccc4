"""What lies beside a user's file: modules that it imports, and that nobody else finds.

A folder on `sys.path` is everybody's. transformers looks whether `kernels` is installed and would import a user's
`kernels.py` for it; here only the user's file, and what was found for it, finds that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

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


def _asker() -> str:
    """The top-level name of the module whose code imports, whether by a statement or by `importlib`."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in ("importlib", "_frozen_importlib", "_frozen_importlib_external"):
            return name.partition(".")[0]
        frame = frame.f_back
    return ""
