"""Regular expressions against responses, in a process that may be killed: `workers.py`."""

from __future__ import annotations

import functools
import re
from typing import Any

from stare_megatron.rewards.child import serve

_compiled = functools.lru_cache(re.compile)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`pattern` and `text` -> whether it matches the whole of it."""
    return {"matches": _compiled(request["pattern"], re.DOTALL).fullmatch(request["text"]) is not None}


if __name__ == "__main__":
    serve(answer)
