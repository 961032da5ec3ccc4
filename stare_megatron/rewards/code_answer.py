"""Programs against the tests that come with a problem, in the sandbox."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stare_megatron.config.reward import CodeConfig
from stare_megatron.rewards.base import RewardContext, RewardError, RewardKind, response_text
from stare_megatron.rewards.code_tests import StdinTest, Test, read_tests
from stare_megatron.sandbox.result import Result, Status
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "python", "py", "python3")
# Calls of one engine under way for each worker of the sandbox: what waits here is on nobody's clock.
_AHEAD = 2
_FAULTS = {
    Status.EXITED: "left before its end",
    Status.TIMEOUT: "took too long",
    Status.MEMORY: "out of memory",
    Status.OUTPUT: "printed too much",
    Status.DISK: "wrote too much",
    Status.KILLED: "crashed",
    Status.TAMPERED: "wrote where it must not",
}


class CodeReward:
    """1 if the last fenced block of Python in the response passes every test of the problem, else 0; with
    `tests_score = "fraction"` the share that it passes. Correct: all. A sandbox that fails grades nothing."""

    def __init__(self, context: RewardContext) -> None:
        assert context.box is not None
        self._config: CodeConfig = context.settings
        self._box = context.box
        s = context.sandbox
        self._turns = asyncio.Semaphore(_AHEAD * s.workers * (1 if s.url else s.actors))

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises:
        RewardError: tests that cannot be read, or a sandbox that fails.
        """
        try:
            tests = chosen(read_tests(prompt.extra[self._config.tests_key]), self._config.max_tests)
        except ValueError as e:
            raise RewardError(str(e)) from e
        code = last_block(response_text(trajectory, tokenizer, skip_special_tokens=True))
        if code is None:
            return Score(0.0, False, "no complete block of Python code")
        passed, first = 0, ""
        for number, test in enumerate(tests, 1):
            fault = await self._fault(test, code)
            passed += not fault
            first = first or (fault and f"test {number} of {len(tests)}: {fault}")
            if fault and self._config.tests_score == "all":
                return Score(0.0, False, first)
        return Score(passed / len(tests), passed == len(tests), first)

    async def _fault(self, test: Test, code: str) -> str:
        program, stdin = test.program(code)
        async with self._turns:
            result = await self._box.run(program, stdin, seconds=self._config.test_seconds)
        if result.status is Status.LOST:
            raise RewardError(f"the sandbox failed: {result.stderr[:200]}")
        # A whole program may end by `exit()`; what is followed by a call or an assert may not.
        by_exit = isinstance(test, StdinTest) and result.status is Status.EXITED and result.exit_code == 0
        return ("" if by_exit else _status_fault(result)) or test.fault(result.stdout, self._config.tolerance)


def _status_fault(result: Result) -> str:
    if result.status is Status.ERROR:
        return result.stderr.strip().rpartition("\n")[2][:80] or "an exception"
    return _FAULTS.get(result.status, "")


def last_block(text: str) -> str | None:
    """The last complete fenced block of Python, or of no language; None without one."""
    blocks = [match[2] for match in _FENCE.finditer(text) if match[1].lower() in _PYTHON]
    return blocks[-1] if blocks and blocks[-1].strip() else None


def chosen(tests: tuple[Test, ...], most: int) -> tuple[Test, ...]:
    """At most so many, 0: all; those with the longest input, which find what is slow or overflows, in their order."""
    if not most or len(tests) <= most:
        return tests
    longest = sorted(range(len(tests)), key=lambda i: (-tests[i].size, i))[:most]
    return tuple(tests[i] for i in sorted(longest))


@dataclass(frozen=True, kw_only=True)
class CodeKind(RewardKind):
    """Its column is a setting, and its prompts must hold tests that the sandbox's limits allow to pass."""

    make: Callable[[RewardContext], CodeReward] = CodeReward
    needs_sandbox: bool = True

    def columns_of(self, settings: CodeConfig) -> tuple[str, ...]:
        """The one with the tests."""
        return (settings.tests_key,)

    def checker(self, context: RewardContext) -> Callable[[Prompt], None]:
        """Asks for tests that can be read, and passed."""
        config: CodeConfig = context.settings
        most = context.sandbox.output_bytes

        def check(prompt: Prompt) -> None:
            for number, test in enumerate(chosen(read_tests(prompt.extra[config.tests_key]), config.max_tests), 1):
                if test.wanted_bytes > most:
                    raise ValueError(
                        f"test {number} wants {test.wanted_bytes} bytes of output, sandbox.output_bytes is {most}: "
                        "raise it"
                    )

        return check


REWARD = CodeKind(settings=CodeConfig)
