"""Files that are replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

PARTIAL = ".partial"


def write_atomic(path: Path, text: str) -> None:
    """Replace a file's content, in UTF-8: a reader, also after a crash, sees the old or the new one, never a part."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
