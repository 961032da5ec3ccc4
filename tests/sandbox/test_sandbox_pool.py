"""The local pool: results, limits, kept states, failures of workers, what is refused at the door."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import RunError, UserError
from stare_megatron.sandbox import detect as detection
from stare_megatron.sandbox.client import open_sandbox
from stare_megatron.sandbox.level import Level
from stare_megatron.sandbox.pool import Sandbox
from stare_megatron.sandbox.result import Result, Status

CONFIG = SandboxConfig(require="limits", workers=2, wall_seconds=60, cpu_seconds=20, preload=["numpy"])


def with_box(body, config):
    """Run `await body(box)` in a sandbox of the strongest level."""

    async def main():
        async with Sandbox(config) as box:
            return await body(box)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def in_box():
    """`in_box(body)` runs `await body(box)` in a sandbox that many tests share."""
    with asyncio.Runner() as runner:
        box = Sandbox(CONFIG)
        runner.run(box.__aenter__())
        yield lambda body: runner.run(body(box))
        runner.run(box.close())


def test_a_program_reads_and_writes(in_box):
    async def body(box):
        code = "import sys; print(sys.stdin.read().upper()); print('aside', file=sys.stderr); 6 * 7"
        first = await box.run(code, "süß\n", echo=True)
        assert (first.status, first.stdout, first.stderr, first.value) == (Status.OK, "SÜSS\n\n", "aside\n", "42")
        assert first.cpu_ms > 0
        assert first.wall_ms > 0
        assert (await box.run("print(open(0).read(), end='')", "a\nb\nc")).stdout == "a\nb\nc"
        assert (await box.run("None", echo=True)).value == ""
        assert (await box.run("6 * 7")).value == ""
        assert (await box.run("")).status is Status.OK

    in_box(body)


def test_an_exception_shows_the_codes_own_lines(in_box):
    async def body(box):
        result = await box.run("def f(x):\n    return 1 / x\n\nf(0)\n")
        assert result.status is Status.ERROR
        assert result.stderr.splitlines()[0] == "Traceback (most recent call last):"
        assert "return 1 / x" in result.stderr
        assert "ZeroDivisionError: division by zero" in result.stderr
        assert "runner.py" not in result.stderr
        syntax = await box.run("print('before')\nif")
        assert (syntax.status, syntax.stdout) == (Status.ERROR, "")
        assert "SyntaxError" in syntax.stderr

    in_box(body)


def test_ends_of_other_kinds(in_box):
    async def body(box):
        left = await box.run("import sys; print('x'); sys.exit(3)")
        assert (left.status, left.exit_code, left.stdout) == (Status.EXITED, 3, "x\n")
        assert (await box.run("raise SystemExit('bye')")).stderr == "bye\n"
        assert (await box.run("import os; os._exit(0)")).status is Status.EXITED
        killed = await box.run("import os; os.kill(os.getpid(), 11)")
        assert (killed.status, killed.exit_code) == (Status.KILLED, -signal.SIGSEGV)
        much = await box.run("print('x' * 10**6)")
        assert much.status is Status.OUTPUT
        assert much.stdout == "x" * CONFIG.output_bytes
        assert (await box.run("while True: pass", seconds=0.3)).status is Status.TIMEOUT

    in_box(body)


def test_calls_start_alike_and_share_nothing(in_box):
    async def body(box):
        code = "import os, random, numpy\nprint(random.random(), numpy.random.rand())\nopen('f', 'w').close()"
        assert (await box.run(code)).stdout == (await box.run(code)).stdout
        assert (await box.run("import os; print(os.listdir(), 'x' in globals())")).stdout == "[] False\n"
        assert (
            await box.run("import os; print(os.getcwd() == os.environ['HOME'] == os.environ['TMPDIR'])")
        ).stdout == "True\n"

    in_box(body)


def test_at_most_so_many_at_once(in_box):
    async def body(box):
        started = asyncio.get_running_loop().time()
        results = await asyncio.gather(*(box.run("import time; time.sleep(0.2); print(1)") for _ in range(6)))
        assert [r.stdout for r in results] == ["1\n"] * 6
        # Six of 0.2 s by twos; a bound from below, so that a slow machine does not matter.
        assert asyncio.get_running_loop().time() - started >= 0.6
        assert box.health().waiting == 0

    in_box(body)


def test_a_kept_state(in_box):
    async def body(box):
        async with box.session() as session, box.session() as other:
            assert (await session.run("x = [1]\nopen('f', 'w').write('kept')")).status is Status.OK
            assert (await other.run("'x' in globals()", echo=True)).value == "False"
            assert (await session.run("x.append(2); y")).status is Status.ERROR
            assert (await session.run("import sys; sys.exit(1)")).status is Status.EXITED
            result = await session.run("x, open('f').read(), input()", "in", echo=True)
            assert result.value == "([1, 2], 'kept', 'in')"
            assert (await session.run("input()", "again", echo=True)).value == "'again'"
            assert box.health().sessions == 2
        assert box.health().sessions == 0
        assert (await session.run("1")).status is Status.LOST

    in_box(body)


def test_a_kept_state_that_runs_into_a_limit_begins_again_and_says_so(in_box):
    async def body(box):
        async with box.session() as session:
            await session.run("x = 1")
            assert (await session.run("while True: pass", seconds=0.3)).status is Status.TIMEOUT
            after = await session.run("'x' in globals()", echo=True)
            assert after.value == "False"
            assert after.stderr == "[the state was reset: the cell before ended with status timeout]\n"
            assert (await session.run("1")).stderr == ""

    in_box(body)


def test_a_kept_state_that_is_not_used_ends():
    async def body(box):
        async with box.session() as session:
            await session.run("x = 1")
            await asyncio.sleep(3.0)
            after = await session.run("'x' in globals()", echo=True)
            assert after.value == "False"
            assert after.stderr == "[the state was reset: it was not used for 0.2 s]\n"

    with_box(body, CONFIG.model_copy(update={"idle_seconds": 0.2}))


def test_a_kept_state_does_nothing_between_cells(in_box):
    async def body(box):
        async with box.session() as session:
            await session.run("import time; before = time.process_time()")
            assert (await session.run("time.sleep(1.0)\ntime.process_time() - before < 0.5", echo=True)).value == "True"
            child = session._child
            await session.run("1")
            while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:  # the signal is on its way
                await asyncio.sleep(0.01)

    in_box(body)


def workers(box):
    """The processes that fork this box's calls, known by their directories, which are on their command lines."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # another, that has just ended
            if any(base in " ".join(process.cmdline()) for base in box.directories()):
                found.append(process)
    return found


def test_a_worker_that_dies_costs_the_call_in_it_and_is_replaced():
    async def body(box):
        (worker,) = workers(box)
        async with box.session() as session:
            await session.run("import time")
            call = asyncio.ensure_future(session.run("time.sleep(60)"))
            while psutil.Process(session._child.pid).status() != psutil.STATUS_SLEEPING:
                await asyncio.sleep(0.01)
            worker.kill()
            result = await call
            assert result.status is Status.LOST
            assert "the worker died" in result.stderr
            assert (await box.run("print(1)")).stdout == "1\n"
            assert (box.health().workers_alive, box.health().workers_replaced) == (1, 1)
            assert "status lost" in (await session.run("1")).stderr

    with_box(body, CONFIG.model_copy(update={"workers": 1}))


def test_a_cancelled_call_leaves_nothing(in_box):
    async def body(box):
        async def left():
            deep = [c for w in workers(box) for c in w.children(recursive=True)]
            return len(deep) + sum(len(os.listdir(d)) for d in box.directories())

        idle = await left()
        call = asyncio.ensure_future(box.run("import time; time.sleep(60)"))
        while await left() == idle:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await left() == idle
        assert (await box.run("print(1)")).stdout == "1\n"

    in_box(body)


def test_nothing_is_left_when_the_driver_is_killed():
    """Neither processes nor directories: the workers notice and clean up."""
    code = (
        "import asyncio\n"
        "from stare_megatron.sandbox.pool import Sandbox\n"
        "from stare_megatron.config.sandbox import SandboxConfig\n"
        "async def main():\n"
        "    async with Sandbox(SandboxConfig(require='limits', workers=1, preload=[])) as box:\n"
        "        async with box.session() as s:\n"
        '            await s.run(\'open("f", "w").close()\')\n'
        "            print(*box.directories(), flush=True)\n"
        "            await s.run('while True: pass')\n"
        "asyncio.run(main())\n"
    )

    async def main():
        driver = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
        base = Path((await driver.stdout.readline()).decode().strip())
        assert base.parent == Path(tempfile.gettempdir())
        below = psutil.Process(driver.pid).children(recursive=True)
        assert below
        driver.kill()
        await driver.wait()
        for _ in range(6000):
            if not base.exists() and not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in below):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"left: {base.exists()}, {[p for p in below if p.is_running()]}")

    asyncio.run(main())


def test_a_level_that_is_not_there_is_refused_at_the_door(monkeypatch):
    async def absent(level):
        return "" if level is Level.LIMITS else "a kernel without it"

    monkeypatch.setattr(detection, "why_not", absent)
    with pytest.raises(UserError, match=r"sandbox.require = 'landlock' .*a kernel without it.*Linux 5.13.*sandbox.url"):
        asyncio.run(detection.detect(Level.LANDLOCK))
    found = asyncio.run(detection.detect(Level.LIMITS))
    assert found.level is Level.LIMITS
    assert set(found.missing) == {Level.FILTER, Level.LANDLOCK, Level.NAMESPACES}


def test_a_level_that_lets_something_through_does_not_count(monkeypatch):
    """The probe believes what code in the sandbox can do, not what was asked for."""
    weak = detection.plan_for(Level.LIMITS, ())
    monkeypatch.setattr(detection, "plan_for", lambda level, preload: weak)
    assert asyncio.run(detection.why_not(Level.LIMITS)) == ""
    assert "seccomp" in asyncio.run(detection.why_not(Level.FILTER))


def test_a_module_that_cannot_be_preloaded_is_named():
    with pytest.raises(RunError, match=r"no worker starts: .*no_such_module.*sandbox.preload"):
        with_box(lambda box: box.check(), CONFIG.model_copy(update={"preload": ["no_such_module"]}))


def test_levels_are_ordered_and_say_what_to_enable():
    assert sorted(Level) == [Level.LIMITS, Level.FILTER, Level.LANDLOCK, Level.NAMESPACES]
    for weaker, stronger in zip(list(Level), list(Level)[1:], strict=False):
        if stronger is not Level.NAMESPACES:
            assert weaker.mechanisms < stronger.mechanisms
        assert stronger.cure != weaker.cure


def test_open_sandbox_runs_here_without_a_url():
    async def main():
        async with open_sandbox(CONFIG) as box:
            return await box.run("print(1)")

    result = asyncio.run(main())
    assert isinstance(result, Result)
    assert result.stdout == "1\n"
