"""Code run on a server that speaks SandboxFusion's HTTP API: `POST /run_code`, bytedance/SandboxFusion, sandbox_api.py.

How well such a server confines the code is its own affair. What is here bounds time: every call ends, as a `Result`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import httpx

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import UserError
from stare_megatron.sandbox.result import Result, Status, lost
from stare_megatron.sandbox.session import Session

_MARGIN_SECONDS = 10.0  # for the server's own work and the way there and back
_RETRY_SECONDS = 0.5  # before the first further attempt; doubles
_BUSY = (429, 502, 503, 504)  # HTTP: nobody answered, or not now
_FINISHED, _TIME_LIMIT = "Finished", "TimeLimitExceeded"

# Wraps the code where the caller wants the value of a trailing expression: the server has no such thing.
_ECHO = """\
import ast as _ast
_tree = _ast.parse({code!r}, "<cell 1>")
_last = _tree.body.pop() if _tree.body and isinstance(_tree.body[-1], _ast.Expr) else None
exec(compile(_tree, "<cell 1>", "exec"), globals())
if _last is not None:
    _value = eval(compile(_ast.Expression(_last.value), "<cell 1>", "eval"), globals())
    print({mark!r} + repr(_value) * (_value is not None), end="")
"""
_MARK = "\x1e"  # between stdout and the value


class RemoteSandbox:
    """`async with RemoteSandbox(config) as box: result = await box.run("print(2 + 2)")`. Use it from one event loop.

    At most `config.workers` requests are under way. A request that fails is tried again `config.retries` times, then
    the call is `Status.LOST`. There are no kept states.
    """

    def __init__(self, config: SandboxConfig, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._config = config
        self._free = asyncio.Semaphore(config.workers)
        self._client = httpx.AsyncClient(base_url=config.url, transport=transport, trust_env=False)

    async def __aenter__(self) -> RemoteSandbox:
        """Raises:
        UserError: the server does not run a program.
        """
        if not await self.check():
            raise UserError(
                f"sandbox.url = {self._config.url!r}: no SandboxFusion-compatible server runs code there; start one, "
                "mend the address, or leave sandbox.url empty"
            )
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.aclose()

    async def check(self) -> bool:
        """Whether a call gets through now."""
        return (await self.run("print('well')")).stdout == "well\n"

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = math.inf) -> Result:
        """Run a program from a fresh state; see `Sandbox.run`. `cpu_ms` is 0: the server does not say."""
        limit = min(self._config.wall_seconds, seconds)
        code = code.encode("utf-8", "backslashreplace").decode()  # JSON has no lone surrogates
        body = {
            "code": _ECHO.format(code=code, mark=_MARK) if echo else code,
            "language": "python",
            "run_timeout": limit,
            "memory_limit_MB": self._config.memory_mb,
            "stdin": stdin.encode("utf-8", "backslashreplace").decode(),
        }
        async with self._free:
            started = time.monotonic()
            why = ""
            for attempt in range(self._config.retries + 1):
                if attempt:
                    await asyncio.sleep(_RETRY_SECONDS * 2 ** (attempt - 1))
                try:
                    # httpx bounds each read; this, the whole answer.
                    async with asyncio.timeout(limit + _MARGIN_SECONDS):
                        answer = await self._client.post("/run_code", json=body, timeout=limit + _MARGIN_SECONDS)
                except (httpx.HTTPError, TimeoutError) as e:
                    why = f"{type(e).__name__}: {e}".rstrip(": ")
                    continue
                if answer.status_code not in _BUSY:
                    return self._result(answer, 1000 * (time.monotonic() - started))
                why = f"HTTP {answer.status_code}"
            return lost(f"sandbox server {self._config.url}: {why}", 1000 * (time.monotonic() - started))

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """Raises:
        UserError: always; the API keeps no state.
        """
        raise UserError(
            "sandbox.url is set: a SandboxFusion server keeps no state across calls; leave sandbox.url empty"
        )
        yield

    def _result(self, answer: httpx.Response, wall_ms: float) -> Result:
        """An answer as a `Result`."""
        try:
            said = answer.raise_for_status().json()
            ran = said["run_result"]
            if said["status"] == "SandboxError" or ran is None:
                return lost(f"sandbox server {self._config.url}: {said['message']}"[:1000], wall_ms)
            return self._ran(ran, wall_ms)
        except (httpx.HTTPError, json.JSONDecodeError, KeyError, TypeError) as e:
            return lost(f"sandbox server {self._config.url}: not an answer to run_code: {e!r}"[:1000], wall_ms)

    def _ran(self, ran: dict[str, Any], wall_ms: float) -> Result:
        out, mark, value = (ran["stdout"] or "").partition(_MARK)
        err = ran["stderr"] or ""
        code = ran["return_code"] if ran["return_code"] is not None else -1
        most = self._config.output_bytes
        if ran["execution_time"] is not None:
            wall_ms = 1000 * float(ran["execution_time"])
        if ran["status"] == _TIME_LIMIT:
            status = Status.TIMEOUT
        elif ran["status"] != _FINISHED:
            return lost(f"sandbox server {self._config.url}: {err}"[:1000], wall_ms)
        elif len(out.encode()) + len(err.encode()) > most:
            status = Status.OUTPUT
        elif code == 0:
            status = Status.OK
        elif code < 0:
            status = Status.KILLED
        else:
            last = err.strip().rpartition("\n")[2]
            status = Status.MEMORY if last.startswith("MemoryError") else Status.ERROR
        out, err = out[:most], err[: max(most - len(out), 0)]
        return Result(status, out, err, value if mark else "", code, 0.0, wall_ms)
