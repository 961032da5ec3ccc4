"""Inside the confined child: run cells of code in one `__main__`, say how each ended.

Everything here can be altered by the code it runs; the driver believes what it sees from outside (docs/sandbox.md).
"""

from __future__ import annotations

import ast
import builtins
import linecache
import os
import random
import struct
import sys
import traceback
import types
from types import CodeType, TracebackType

from stare_megatron.sandbox.plan import CODE, GO, REPORT

READY = b"R"
ORDER = struct.Struct("=16sI?")  # token, bytes of code, echo the last expression
ANSWER = struct.Struct("=16scII")  # token, outcome, exit code, bytes of value
OK, ERROR, MEMORY, EXITED = b"O", b"E", b"M", b"X"


class _Caught:
    """A `with` block that keeps whatever was raised in it: code may raise anything."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return error is not None


def serve(value_bytes: int) -> None:
    """Run cells until the driver kills this process. `value_bytes`: longest value that is answered.

    Every call starts from the same random state, so that the same code gives the same result.
    """
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = [""]
    random.seed(0)
    if "numpy" in sys.modules:  # not imported here: a sandbox need not have it
        sys.modules["numpy"].random.seed(0)
    os.write(REPORT, READY)
    count = 0
    while order := os.read(GO, ORDER.size):
        token, length, echo = ORDER.unpack(order)
        count += 1
        outcome, code, value = _cell(main, os.pread(CODE, length, 0), echo, f"<cell {count}>")
        text = value.encode("utf-8", "backslashreplace")[:value_bytes]
        answer = ANSWER.pack(token, outcome, code & 0xFFFFFFFF, len(text)) + text
        while answer:
            answer = answer[os.write(REPORT, answer) :]


def _cell(main: types.ModuleType, source: bytes, echo: bool, name: str) -> tuple[bytes, int, str]:
    """Outcome, exit code and value of one cell."""
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    out, err = sys.stdout, sys.stderr
    text, value = "", ""
    with _Caught() as caught:
        text = source.decode("utf-8", "surrogatepass")
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        body, last = _compile(text, name, echo)
        exec(body, main.__dict__)
        if last is not None:
            result = eval(last, main.__dict__)
            value = "" if result is None else repr(result)
    error, code = caught.error, 0
    outcome = OK
    if isinstance(error, SystemExit):
        outcome, code = EXITED, _exit_code(error, err)
    elif error is not None:
        outcome, code = (MEMORY if isinstance(error, MemoryError) else ERROR), 1
        with _Caught() as second:
            err.write(_explain(error))
        if second.error is not None:
            with _Caught():
                err.write(f"{type(error).__name__} (its traceback cannot be shown)\n")
    for stream in (sys.stdout, sys.stderr, out, err):
        with _Caught():
            stream.flush()
    return outcome, code, value


def _compile(text: str, name: str, echo: bool) -> tuple[CodeType, CodeType | None]:
    """The cell, and apart from it the trailing expression if its value is wanted."""
    tree = ast.parse(text, name)
    last = None
    end = tree.body[-1] if tree.body else None
    if echo and isinstance(end, ast.Expr):
        tree.body.pop()
        last = compile(ast.Expression(end.value), name, "eval")
    return compile(tree, name, "exec"), last


def _exit_code(error: SystemExit, err: object) -> int:
    """As the interpreter does: an integer is the code, anything else is printed."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with _Caught():
        sys.stderr.write(f"{error.code}\n")
    return 1


def _explain(error: BaseException) -> str:
    """The traceback from the cell's own frames on."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))
