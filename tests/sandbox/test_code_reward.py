"""Programs against their tests in the sandbox of this machine."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from stare_megatron.config import RewardConfig
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.rewards import make_reward
from stare_megatron.sandbox.pool import Sandbox
from tests.unit.rewards.test_rewards import PROMPT, Text, written

SANDBOX = SandboxConfig(require="limits", workers=2, wall_seconds=120, cpu_seconds=60, preload=[])
SUMS = {"inputs": ["1 2\n", "30 -4\n", "5 5"], "outputs": ["3\n", "26\n", "10"]}
FIB = {"fn_name": "fib", "inputs": [[1], [2], [10]], "outputs": [[1], [1], [55]]}
MBPP = ["assert double(2) == 4", "assert double([1]) == [1, 1]"]
HUMANEVAL = {"setup": "def check(f):\n    assert f(1.5, 1.6)\n    assert not f(1.0, 2.0)", "asserts": ["check(near)"]}


@pytest.fixture(scope="module")
def grade():
    """`grade(code, tests, **settings)` in a sandbox that many tests share."""
    with asyncio.Runner() as runner:
        box = Sandbox(SANDBOX)
        runner.run(box.__aenter__())

        def scored(code, tests, **settings):
            reward = make_reward(
                RewardConfig.model_validate({"name": "code", "test_seconds": 60, **settings}), box, SANDBOX
            )
            prompt = dataclasses.replace(PROMPT, extra={"tests": tests})

            async def main():
                return await reward(prompt, written("1"), Text(f"Here:\n```python\n{code}\n```\n"))

            return runner.run(main())

        yield scored
        runner.run(box.close())


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("a, b = map(int, input().split())\nprint(a + b)", SUMS),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))\nexit()", SUMS),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", SUMS),
        ("def fib(n: int) -> int:\n    return n if n < 2 else fib(n - 1) + fib(n - 2)", FIB),
        (
            "from __future__ import annotations\nclass Solution:\n    def fib(self, n: List[int]) -> int:\n"
            "        print('look')\n        a, b = 0, 1\n        for _ in range(n):\n            a, b = b, a + b\n"
            "        return a",
            FIB,
        ),
        ("def double(x):\n    return x + x", MBPP),
        ("def near(a: float, b: float, c: Optional[float] = None):\n    return abs(a - b) < 0.5", HUMANEVAL),
    ],
)
def test_right_programs(grade, code, tests):
    score = grade(code, tests)
    assert (score.reward, score.correct, score.note) == (1.0, True, "")


@pytest.mark.parametrize(
    ("code", "tests", "reward", "note"),
    [
        ("a, b = map(int, input().split())\nprint(a + abs(b))", SUMS, 2 / 3, "test 2 of 3: printed '34', want '26'"),
        ("print(3", SUMS, 0, "test 1 of 3: SyntaxError: '(' was never closed"),
        ("print(input(), input(), input(), input())", SUMS, 0, "test 1 of 3: EOFError: EOF when reading a line"),
        ("x = 3", SUMS, 0, "test 1 of 3: printed '', want '3'"),
        ("while True: print('x' * 9999)", SUMS, 0, "test 1 of 3: printed too much"),
        ("def fib(n):\n    return 1", FIB, 2 / 3, "test 3 of 3: returned 1, want [55]"),
        ("def fibo(n):\n    return 1", FIB, 0, "test 1 of 3: NameError: name 'fib' is not defined"),
        ("def fib(n):\n    return {1}", FIB, 0, "test 1 of 3: TypeError: Object of type set is not JSON serializable"),
        ("import sys\nsys.exit()", FIB, 0, "test 1 of 3: left before its end"),
        ("import sys\nsys.exit()", MBPP, 0, "test 1 of 2: left before its end"),
        ("import os\nos._exit(0)", MBPP, 0, "test 1 of 2: left before its end"),
        ("def double(x):\n    return 2 * x if type(x) is int else x", MBPP, 0.5, "test 2 of 2: AssertionError"),
        ("def near(a, b):\n    return True", HUMANEVAL, 0, "test 1 of 1: AssertionError"),
    ],
)
def test_wrong_programs(grade, code, tests, reward, note):
    score = grade(code, tests, tests_score="fraction")
    assert (score.reward, score.correct, score.note) == (pytest.approx(reward), False, note)
    assert grade(code, tests).reward == 0.0


def test_what_takes_too_long_is_wrong_and_the_next_one_runs(grade):
    score = grade("while True: pass", SUMS, test_seconds=1.0)
    assert (score.reward, score.note) == (0.0, "test 1 of 3: took too long")
    assert grade("print(sum(map(int, input().split())))", SUMS).correct


def test_what_is_wanted_is_not_in_the_sandbox(grade):
    """An answer that prints what it can find of its surroundings finds no expected output."""
    look = "import gc, sys\nprint(sys.stdin.read(), [o for o in gc.get_objects() if '26' in repr(o)[:4]])"
    assert grade(look, SUMS | {"inputs": ["1 2\n", "-4 30", "5 5"]}, tests_score="fraction").reward == 0.0
