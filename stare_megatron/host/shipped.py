"""Text that travels with the package: pages of docs/ and the files of examples/."""

from __future__ import annotations

import re
from pathlib import Path

from stare_megatron.errors import UserError, suggest

_INCLUDE = re.compile(r'^include = "([^"]+)"$', re.MULTILINE)
_PACKAGE = Path(__file__).resolve().parents[1]


def shipped(folder: str, name: str) -> str:
    """The text of a file of `docs` or `examples`, of a page named without `.md`; for "" the names, one per line.

    What an example includes stays where it is: the text names it by its whole path, so that it can be saved anywhere.

    Raises:
        UserError: no such file.
    """
    # A wheel has the folders inside the package, a checkout beside it.
    root = next(p / folder for p in (_PACKAGE, _PACKAGE.parent) if (p / folder).is_dir())
    found = [file for pattern in ("*.md", "*/*.*") for file in sorted(root.glob(pattern))]
    files = {file.relative_to(root).as_posix().removesuffix(".md"): file for file in found}
    if name and name not in files:
        below = ", ".join(file for file in files if file.startswith(f"{name.rstrip('/')}/"))
        within = ", ".join(file for file in files if name.casefold() in file.casefold())
        others = f"; there is {within}" if within else "; without a name they are listed"
        hint = f"; there is {below}" if below else suggest(name, files) or others
        raise UserError(f"no {name!r} in {folder}{hint}")
    if not name:
        return "\n".join(files)
    text, beside = files[name].read_text(), files[name].parent
    return _INCLUDE.sub(lambda found: f'include = "{(beside / found[1]).resolve()}"', text)
