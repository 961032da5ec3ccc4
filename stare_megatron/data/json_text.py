"""Values of JSON text, as rows of data hold them."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

_MOST_DIGITS = 4000  # Python reads no more than 4300, unless it is told to
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def decode(text: str, begin: int = 0) -> tuple[Any, int]:
    """The value that begins at `begin`, which is no white space, and where it ends.

    Raises:
        ValueError: what is wrong, in a line: no JSON (a JSONDecodeError), a key twice in an object, too deep nesting,
            or half a surrogate pair, which is no text.

    NaN, Infinity and numbers too large to be read are floats that are not finite: whoever uses one, refuses it.
    """
    try:
        value, end = _DECODER.raw_decode(text, begin)
        if _SURROGATE.search(text, begin, end):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair (\\ud800 to \\udfff) is no character") from None
    return value, end


def decode_line(line: str) -> Any:
    """The value of a line that holds nothing else.

    Raises:
        ValueError: what is wrong, and where it is known the column.
    """
    text = line.strip().removeprefix("\ufeff")
    try:
        value, end = decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as e:
        raise ValueError(f"{e.msg} (column {e.colno})") from e
    return value


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.60} twice in one object")
    return found


_DECODER = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_once)
