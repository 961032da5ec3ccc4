"""Text that travels with the package: pages of docs/ and the files of examples/."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.errors import UserError, suggest

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: str, name: str) -> str:
    """The text of a file of `docs` or `examples`, of a page named without `.md`; for "" the names, one per line.

    Raises:
        UserError: no such file.
    """
    # A wheel has the folders inside the package, a checkout beside it.
    root = next(p / folder for p in (_PACKAGE, _PACKAGE.parent) if (p / folder).is_dir())
    found = [file for pattern in ("*.md", "*/*.*") for file in sorted(root.glob(pattern))]
    files = {file.relative_to(root).as_posix().removesuffix(".md"): file for file in found}
    if name and name not in files:
        raise UserError(f"no {name!r} in {folder}{suggest(name, files) or '; without a name they are listed'}")
    return files[name].read_text() if name else "\n".join(files)
