"""The client of a SandboxFusion-compatible server, against answers of a transport that stands in for the network."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import UserError
from stare_megatron.sandbox import remote
from stare_megatron.sandbox.remote import RemoteSandbox
from stare_megatron.sandbox.result import Status

CONFIG = SandboxConfig(url="http://server:8080", wall_seconds=3, memory_mb=100, output_bytes=100, retries=2)
RAN = {"status": "Finished", "execution_time": 0.25, "return_code": 0, "stdout": "well\n", "stderr": ""}


def answer(status="Success", message="", **ran):
    return {"status": status, "message": message, "compile_result": None, "run_result": RAN | ran, "files": {}}


def call(answers, *arguments, config=CONFIG, **options):
    """The result of one call, and the requests it made; `answers`: bodies, HTTP statuses or exceptions in order."""
    seen, left = [], iter(answers)

    def serve(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, json.loads(request.content)))
        said = next(left)
        if isinstance(said, Exception):
            raise said
        return httpx.Response(said) if isinstance(said, int) else httpx.Response(200, json=said)

    async def main():
        box = RemoteSandbox(config, httpx.MockTransport(serve))
        return await box.run(*arguments, **options)

    return asyncio.run(main()), seen


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "_RETRY_SECONDS", 0.0)


def test_a_request_is_what_the_server_documents():
    result, seen = call([answer()], "print('well')", "in")
    body = {"code": "print('well')", "language": "python", "run_timeout": 3, "memory_limit_MB": 100, "stdin": "in"}
    assert seen == [("/run_code", body)]
    assert (result.status, result.stdout, result.exit_code, result.wall_ms) == (Status.OK, "well\n", 0, 250.0)
    _, seen = call([answer()], "1", seconds=0.5)
    assert seen[0][1]["run_timeout"] == 0.5


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (answer("Failed", return_code=1, stderr="ValueError: x"), Status.ERROR),
        (answer("Failed", return_code=1, stderr="Traceback\nMemoryError"), Status.MEMORY),
        (answer("Failed", return_code=-9), Status.KILLED),
        (
            answer("Failed", status_="", return_code=None) | {"run_result": RAN | {"status": "TimeLimitExceeded"}},
            Status.TIMEOUT,
        ),
        (answer(stdout="x" * 101), Status.OUTPUT),
        (answer("SandboxError", "no room"), Status.LOST),
        ({"detail": "what?"}, Status.LOST),
        ([], Status.LOST),
        (404, Status.LOST),
    ],
)
def test_every_answer_is_a_result(said, status):
    result, seen = call([said], "code")
    assert result.status is status
    assert len(seen) == 1
    assert len(result.stdout) <= 100


def test_a_busy_or_absent_server_is_asked_again_so_often_and_no_more():
    result, seen = call([503, httpx.ConnectError("refused"), answer()], "code")
    assert (result.status, len(seen)) == (Status.OK, 3)
    result, seen = call([503, httpx.ReadTimeout("slow"), httpx.ConnectError("refused")], "code")
    assert (result.status, len(seen)) == (Status.LOST, 3)
    assert "http://server:8080" in result.stderr
    assert "refused" in result.stderr


def test_a_server_that_hangs_costs_bounded_time(monkeypatch):
    monkeypatch.setattr(remote, "_MARGIN_SECONDS", 0.05)

    async def hang(request):
        await asyncio.sleep(60)

    async def main():
        config = CONFIG.model_copy(update={"wall_seconds": 0.05, "retries": 1})
        return await asyncio.wait_for(RemoteSandbox(config, httpx.MockTransport(hang)).run("code"), 30)

    assert asyncio.run(main()).status is Status.LOST


def test_the_value_of_a_trailing_expression_comes_through(capsys):
    _, seen = call([answer()], "x = 6\nprint('out')\nx * 7", echo=True)
    exec(seen[0][1]["code"], {"__name__": "__main__"})
    printed = capsys.readouterr().out
    result, _ = call([answer(stdout=printed)], "x * 7", echo=True)
    assert (result.stdout, result.value) == ("out\n", "42")
    _, seen = call([answer()], "y = 1", echo=True)
    exec(seen[0][1]["code"], {"__name__": "__main__"})
    assert capsys.readouterr().out == ""


def test_code_that_is_no_text_does_not_break_the_request():
    result, seen = call([answer()], "x = '\ud800'")
    assert result.status is Status.OK
    assert seen[0][1]["code"] == "x = '\\ud800'"


def test_no_server_and_no_sessions_are_refused():
    async def door():
        transport = httpx.MockTransport(lambda request: httpx.Response(404))
        async with RemoteSandbox(CONFIG, transport):
            raise AssertionError("let in")

    with pytest.raises(UserError, match=r"sandbox.url = 'http://server:8080'"):
        asyncio.run(door())

    async def session():
        async with RemoteSandbox(CONFIG, httpx.MockTransport(lambda request: httpx.Response(404))).session():
            raise AssertionError("let in")

    with pytest.raises(UserError, match="keeps no state"):
        asyncio.run(session())
