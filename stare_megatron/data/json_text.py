"""Values of JSON text, as rows of data hold them."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def decode(text: str, begin: int = 0) -> tuple[Any, int]:
    """The value that begins at `begin`, which is no white space, and where it ends.

    Raises:
        ValueError: what is wrong, in a line: no JSON (a JSONDecodeError), NaN or Infinity, too long a number, too deep
            nesting, or half a surrogate pair, which is no text.
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
    text = line.strip()
    try:
        value, end = decode(text)
        if end != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as e:
        raise ValueError(f"{e.msg} (column {e.colno})") from e
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is too large a number")
    return number


_DECODER = json.JSONDecoder(parse_constant=_not_a_number, parse_float=_finite)
