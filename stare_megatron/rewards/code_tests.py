"""Tests that come with a programming problem, in the forms in which problems are published, and as programs."""

from __future__ import annotations

import json
import keyword
import math
from dataclasses import dataclass
from typing import Any

from stare_megatron.data import rows

# Names without which published solutions of one function do not run; the answer may import what else it needs.
_PRELUDE = "from typing import *\n"
_MARK = "\x1e"  # between what the code prints and what the function returned
_CALL = """\
import json as _json, sys as _sys
exec(compile({code!r}, "<answer>", "exec"))
_function = Solution().{function} if "Solution" in globals() else {function}
_told = _json.dumps(_function(*_json.loads({arguments!r})))
_sys.stdout.write({mark!r} + _told)
"""
_ASSERT = 'exec(compile({code!r}, "<answer>", "exec"))\n{test}\n'
_FUNCTIONS = ("function_call", "functional", "call_based")
_WANTED = (
    '{"inputs": [...], "outputs": [...]} (with "fn_name" for a function), {"asserts": [...], "setup": "..."}, a list '
    'of {"input": ..., "output": ...}, or a list of asserts'
)


@dataclass(frozen=True)
class StdinTest:
    """The program reads `stdin` and must print `stdout`."""

    stdin: str
    stdout: str

    @property
    def size(self) -> int:
        """Characters of the input."""
        return len(self.stdin)

    @property
    def wanted_bytes(self) -> int:
        return len(self.stdout.encode("utf-8", "surrogatepass"))

    def program(self, code: str) -> tuple[str, str]:
        """What is run, and its standard input."""
        return code, self.stdin

    def fault(self, printed: str, tolerance: float) -> str:
        """Why what was printed is not what was wanted; "" if it is."""
        if same_output(printed, self.stdout, tolerance):
            return ""
        return f"printed {printed.strip()[:40]!r}, want {self.stdout.strip()[:40]!r}"


@dataclass(frozen=True)
class CallTest:
    """`function(*arguments)`, or that method of a class `Solution`, must return `result`; all JSON."""

    function: str
    arguments: str
    result: Any

    @property
    def size(self) -> int:
        """Characters of the input."""
        return len(self.arguments)

    @property
    def wanted_bytes(self) -> int:
        return len(json.dumps(self.result).encode())

    def program(self, code: str) -> tuple[str, str]:
        """What is run, and its standard input. What the function should return is not in it."""
        call = _CALL.format(code=code, function=self.function, arguments=self.arguments, mark=_MARK)
        return _PRELUDE + call, ""

    def fault(self, printed: str, tolerance: float) -> str:
        """Why what it returned is not what was wanted; "" if it is. A published result may be in a list of its own."""
        _, mark, told = printed.rpartition(_MARK)
        try:
            got = json.loads(told) if mark else None
        except (ValueError, RecursionError):
            mark = ""
        if not mark:
            return "the function's result cannot be read"
        alone = self.result[0] if isinstance(self.result, list) and len(self.result) == 1 else self.result
        if same_value(got, self.result, tolerance) or same_value(got, alone, tolerance):
            return ""
        return f"returned {told[:40]}, want {json.dumps(self.result)[:40]}"


@dataclass(frozen=True)
class AssertTest:
    """Statements that must run to their end after the answer's."""

    statements: str
    wanted_bytes: int = 0

    @property
    def size(self) -> int:
        """Characters of the input."""
        return len(self.statements)

    def program(self, code: str) -> tuple[str, str]:
        """What is run, and its standard input."""
        return _PRELUDE + _ASSERT.format(code=code, test=self.statements), ""

    def fault(self, printed: str, tolerance: float) -> str:
        """It came to its end."""
        return ""


Test = StdinTest | CallTest | AssertTest


def read_tests(value: Any) -> tuple[Test, ...]:
    """The tests of a problem: an object, a list, or either as JSON in a string.

    Raises:
        ValueError: of another form, or none at all.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"tests that are no JSON: {e}; want {_WANTED}") from e
    if isinstance(value, dict) and "inputs" in value:
        tests = _columns(value)
    elif isinstance(value, dict) and "asserts" in value:
        tests = _asserts(value["asserts"], _text(value.get("setup") or "", "setup"))
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        tests = _asserts(value, "")
    elif isinstance(value, list) and all(isinstance(item, dict) and "input" in item for item in value):
        tests = tuple(_single(item, number) for number, item in enumerate(value, 1))
    else:
        raise ValueError(f"tests of no known form: {rows.shown(value)}; want {_WANTED}")
    if not tests:
        raise ValueError("no tests")
    return tests


def _columns(value: dict[str, Any]) -> tuple[Test, ...]:
    """APPS, TACO, CodeContests as others publish it."""
    inputs, outputs = value["inputs"], value.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("want as many outputs as inputs, each a list")
    function = value.get("fn_name") or ""
    return tuple(_made(function, i, o, number) for number, (i, o) in enumerate(zip(inputs, outputs, strict=True), 1))


def _single(item: dict[str, Any], number: int) -> Test:
    """LiveCodeBench, DeepCoder and PrimeIntellect's problems."""
    metadata = item.get("metadata")
    function = item.get("fn_name") or (metadata.get("func_name") if isinstance(metadata, dict) else "") or ""
    if (item.get("testtype") or item.get("type")) in _FUNCTIONS and not function:
        raise ValueError(f"test {number}: a call without the function's name (fn_name)")
    return _made(function, item["input"], item.get("output"), number)


def _made(function: Any, given: Any, wanted: Any, number: int) -> Test:
    if not function:
        return StdinTest(_lines(given, f"input {number}"), _lines(wanted, f"output {number}"))
    if not isinstance(function, str) or not function.isidentifier() or keyword.iskeyword(function):
        raise ValueError(f"fn_name = {rows.shown(function)} is no name of a function")
    try:
        if isinstance(given, str):  # LiveCodeBench: an argument a line
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
    except (ValueError, RecursionError) as e:
        raise ValueError(f"test {number}: an argument or result that is no JSON: {e}") from e
    if not isinstance(given, list):
        raise ValueError(f"input {number}: want the arguments as a list, got {rows.shown(given)}")
    return CallTest(function, json.dumps(given), wanted)


def _asserts(statements: Any, setup: str) -> tuple[Test, ...]:
    """MBPP, HumanEval: run after `setup`, each on its own."""
    if not isinstance(statements, list):
        raise ValueError(f"asserts: want a list, got {rows.shown(statements)}")
    texts = [_text(s, f"assert {number}") for number, s in enumerate(statements, 1)]
    return tuple(AssertTest(f"{setup}\n{text}" if setup else text) for text in texts)


def _lines(value: Any, what: str) -> str:
    if isinstance(value, list):
        return "\n".join(_text(line, what) for line in value)
    return _text(value, what)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: want a text, got {rows.shown(value)}")
    return value


def same_output(printed: str, wanted: str, tolerance: float) -> bool:
    """Line by line, without white space at the ends of lines and blank lines at the end; within a line word by word,
    numbers with a decimal point to `tolerance`, absolute or relative."""
    got, want = ([line.split() for line in text.rstrip().split("\n")] for text in (printed, wanted))
    return len(got) == len(want) and all(
        len(a) == len(b) and all(x == y or _near_words(x, y, tolerance) for x, y in zip(a, b, strict=True))
        for a, b in zip(got, want, strict=True)
    )


def _near_words(got: str, want: str, tolerance: float) -> bool:
    if "." not in want:
        return False
    try:
        return _near(float(got), float(want), tolerance)
    except ValueError:
        return False


def same_value(got: Any, want: Any, tolerance: float) -> bool:
    """Equal as Python says, floats to `tolerance`, absolute or relative."""
    if isinstance(got, list) and isinstance(want, list):
        return len(got) == len(want) and all(same_value(a, b, tolerance) for a, b in zip(got, want, strict=True))
    if isinstance(got, dict) and isinstance(want, dict):
        return got.keys() == want.keys() and all(same_value(got[k], want[k], tolerance) for k in want)
    if isinstance(want, float) and isinstance(got, int | float):
        return _near(got, want, tolerance)
    return got == want


def _near(got: float, want: float, tolerance: float) -> bool:
    return math.isfinite(got) and math.isclose(got, want, rel_tol=tolerance, abs_tol=tolerance)
