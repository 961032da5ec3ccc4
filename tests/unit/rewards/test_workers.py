"""The pool of grading processes under attack: hangs, memory, deaths, threads, ends of the parent."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from stare_megatron.config import RewardConfig
from stare_megatron.config.reward import WorkerConfig
from stare_megatron.errors import RunError
from stare_megatron.rewards import make_reward
from stare_megatron.rewards.base import RewardError
from stare_megatron.rewards.math_answer import MathReward
from stare_megatron.rewards.workers import WorkerError, WorkerLimits, WorkerPool
from stare_megatron.tasks import reasoning
from tests.unit.rewards.test_rewards import PROMPT, Text, written

pytestmark = pytest.mark.parts

MATH = "stare_megatron.rewards.math_worker"
WORKER = """
import os, signal, time
from stare_megatron.rewards import child
hoard = []
def answer(request):
    what = request["do"]
    if what == "die":
        os._exit(3)
    if what == "die once":
        if not os.path.exists(request["mark"]):
            open(request["mark"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "hoard":
        while True:
            hoard.append(bytearray(2**24))
            time.sleep(0.01)
    if what == "hang":
        if "mark" in request:
            with open(request["mark"], "w") as f:
                f.write(str(os.getpid()))
        10 ** 10 ** 10  # one instruction: no signal handler runs and no other thread
    if what == "sleep":
        time.sleep(request["seconds"])
    return {"pid": os.getpid()}
child.serve(answer)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "stare_test_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "stare_test_worker"


def limits(seconds: float = 30.0, memory_mb: int = 256) -> WorkerLimits:
    return WorkerLimits(seconds, memory_mb << 20)


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(true) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("not within 300 s")


def test_a_hanging_worker_is_killed_and_the_loop_goes_on(module, tmp_path):
    async def run() -> tuple[int, int, int]:
        pool = WorkerPool(module, 1, limits(seconds=3.0))
        first = (await pool.call({"do": "work"}))["pid"]
        again = (await pool.call({"do": "work"}))["pid"]
        hanging = asyncio.create_task(pool.call({"do": "hang"}))
        ticks = 0
        while not hanging.done():  # the loop is not blocked meanwhile
            await asyncio.sleep(0.05)
            ticks += 1
        with pytest.raises(WorkerError, match="no answer within 3 s"):
            await hanging
        assert first == again
        assert ended(first)
        other = (await pool.call({"do": "work"}))["pid"]
        await pool.close()
        return first, other, ticks

    first, other, ticks = asyncio.run(run())
    assert first != other
    assert ticks > 5
    assert ended(other)


def test_a_reply_that_waited_for_a_busy_loop_still_counts(module):
    async def run() -> int:
        pool = WorkerPool(module, 1, limits(seconds=2.0))
        pid = (await pool.call({"do": "work"}))["pid"]
        call = asyncio.create_task(pool.call({"do": "sleep", "seconds": 0.2}))
        await asyncio.sleep(0.05)
        time.sleep(5.0)  # somebody blocks the loop past the time-out
        assert (await call)["pid"] == pid
        await pool.close()
        return pid

    assert ended(asyncio.run(run()))


def test_a_worker_that_swallows_memory_is_killed(module):
    async def run() -> None:
        pool = WorkerPool(module, 1, limits())
        pid = (await pool.call({"do": "work"}))["pid"]
        with pytest.raises(WorkerError, match="more than 256 MB of memory"):
            await pool.call({"do": "hoard"})
        assert ended(pid)
        assert "pid" in await pool.call({"do": "work"})
        await pool.close()

    asyncio.run(run())


def test_a_worker_that_dies_of_its_request_fails_that_request_only(module):
    async def run() -> None:
        pool = WorkerPool(module, 1, limits())
        with pytest.raises(WorkerError, match="died twice, last with exit code 3"):
            await pool.call({"do": "die"})
        assert "pid" in await pool.call({"do": "work"})
        await pool.close()

    asyncio.run(run())


def test_a_worker_killed_by_others_costs_nothing(module, tmp_path):
    async def run() -> None:
        pool = WorkerPool(module, 1, limits())
        pid = (await pool.call({"do": "work"}))["pid"]
        os.kill(pid, signal.SIGKILL)  # while it idles
        other = (await pool.call({"do": "work"}))["pid"]
        assert other != pid
        third = (await pool.call({"do": "die once", "mark": str(tmp_path / "mark")}))["pid"]  # in the middle of it
        assert third != other
        await pool.close()

    asyncio.run(run())


def test_a_cancelled_call_leaves_no_process(module, tmp_path):
    mark = tmp_path / "mark"

    async def run() -> int:
        pool = WorkerPool(module, 1, limits())
        call = asyncio.create_task(pool.call({"do": "hang", "mark": str(mark)}))
        while not (mark.exists() and mark.read_text()):
            await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return int(mark.read_text())

    assert ended(asyncio.run(run()))


def test_a_worker_that_does_not_start_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "stare_broken_worker.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match="stare_broken_worker does not start"):
        asyncio.run(WorkerPool("stare_broken_worker", 1, limits()).call({}))


PARENT = """
import asyncio, os, sys
from stare_megatron.rewards.workers import WorkerLimits, WorkerPool
async def run():
    pool = WorkerPool("stare_test_worker", 2, WorkerLimits(600.0, 2**30))
    print((await pool.call({"do": "work"}))["pid"], flush=True)
    hanging = asyncio.create_task(pool.call({"do": "hang", "mark": sys.argv[1]}))
    other = asyncio.create_task(pool.call({"do": "sleep", "seconds": 0.01}))
    print((await other)["pid"], flush=True)
    while not (os.path.exists(sys.argv[1]) and open(sys.argv[1]).read()):
        await asyncio.sleep(0.05)
    if sys.argv[2] == "exit":
        sys.exit(0)
    if sys.argv[2] == "_exit":
        os._exit(0)
    print("killed", flush=True)
    await asyncio.sleep(600)
asyncio.run(run())
"""


@pytest.mark.parametrize("end", ["exit", "_exit", "kill"])
def test_no_process_outlives_its_parent_even_if_it_hangs(module, tmp_path, end):
    mark = tmp_path / "mark"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, mark, end], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    if end == "kill":
        assert parent.stdout.readline() == "killed\n"
        parent.kill()
    parent.wait(600)
    pids.append(int(mark.read_text()))
    wait_until(lambda: all(ended(pid) for pid in pids))
    parent.stdout.close()


def grade(reward, cases: list[tuple[str, str]]) -> list[object]:
    """What the reward says of (reference, response) pairs, all at once: correct, or the RewardError."""

    async def one(answer: str, text: str) -> object:
        prompt = PROMPT.__class__("p", "s", "?", (1,), answer)
        try:
            return (await reward(prompt, written("1"), Text(text))).correct
        except RewardError as e:
            return e

    async def run() -> list[object]:
        try:
            return list(await asyncio.gather(*(one(a, t) for a, t in cases)))
        finally:
            await reward.close()

    return asyncio.run(run())


# The last is what sympy works at for ever; the others are refused before.
HANGS = [r"\boxed{2^{2^{2^{2^{10}}}}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{((7!)!)!}", r"\boxed{\binom{10^9}{10^8}}"]


def test_hanging_answers_fail_alone_among_64():
    cases = [("17", rf"\boxed{{{17 + i % 2}}}") for i in range(64)]
    for place, text in zip((3, 20, 40, 63), HANGS, strict=True):
        cases[place] = ("17", text)
    said = grade(MathReward(WorkerConfig(timeout=5.0, processes=2, memory_mb=512)), cases)
    for i, result in enumerate(said):
        if cases[i][1] == HANGS[-1]:
            assert isinstance(result, RewardError)
        else:
            assert result is (i % 2 == 0 and cases[i][1] not in HANGS)


def test_grading_works_off_the_main_thread():
    said: list[object] = []
    config = WorkerConfig(processes=1)
    thread = threading.Thread(target=lambda: said.extend(grade(MathReward(config), [("1/2", r"\boxed{0.5}")])))
    thread.start()
    thread.join(600)
    assert said == [True]


def test_a_reference_that_cannot_be_read_is_no_zero():
    (said,) = grade(MathReward(WorkerConfig(processes=1)), [(" ", r"\boxed{0.5}")])
    assert isinstance(said, RewardError)
    assert "cannot be read" in str(said)


def test_an_empty_box_is_wrong():
    assert grade(MathReward(WorkerConfig(processes=1)), [("17", r"\boxed{}")]) == [False]


def test_what_reasoning_gym_evaluates_is_bounded():
    """Upstream's scorer of it takes the power; the process is ended, and the answer wrong."""
    entry = json.loads(reasoning.prompts("puzzle24", {}, 1, 0, seed=1)[0].answer)
    answer = json.dumps(entry | {"entry": entry["entry"] | {"answer": "9**9**9"}})  # so that it is not refused before
    reward = make_reward(RewardConfig.model_validate({"name": "reasoning_gym", "timeout": 2.0, "processes": 1}))
    began = time.monotonic()
    assert grade(reward, [(answer, "9**9**9**9"), (answer, "[1, 2"), (answer, "")]) == [False, False, False]
    assert time.monotonic() - began < 120
