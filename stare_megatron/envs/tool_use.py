"""Many turns with a tool: the policy writes code, a sandbox runs it, the policy reads the result and goes on.

docs/tool_use.md is the page of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stare_megatron.config.env import ToolUseConfig
from stare_megatron.data.tokenizer import ends_a_sequence
from stare_megatron.envs.base import End, EnvContext, EnvError, EnvKind
from stare_megatron.envs.parsers import make_parser
from stare_megatron.envs.parsers.base import Encoder, Malformed, Parsed, Request
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.sandbox.result import Result, lost
from stare_megatron.sandbox.result import Status as Outcome
from stare_megatron.sandbox.session import Session
from stare_megatron.types import Call, Completion, Prompt, Status, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MALFORMED = "malformed"
_NOTES = {
    Outcome.TIMEOUT: "[stopped: it took too long]",
    Outcome.MEMORY: "[stopped: out of memory]",
    Outcome.OUTPUT: "[stopped: too much output]",
    Outcome.DISK: "[stopped: too many or too large files]",
    Outcome.KILLED: "[the process crashed]",
    Outcome.TAMPERED: "[the result cannot be trusted]",
    Outcome.LOST: "[the tool failed; try again]",
}
_NOTHING = "[no output]"
_CUT = "\n[... cut ...]\n"
_CHARACTERS_PER_TOKEN = 16  # more than text has, so that a long output need not be encoded whole before it is cut


class ToolUse:
    """One episode; single use. `box`: an open sandbox, shared by the episodes; `clock`: as of `EnvContext`."""

    def __init__(
        self,
        prompt: Prompt,
        box: SandboxClient,
        tokenizer: PreTrainedTokenizerBase,
        config: ToolUseConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises:
        UserError: the tokenizer's chat template cannot render what `config.parser` needs.
        """
        self._prompt = prompt
        self._box = box
        self._tokenizer = tokenizer
        self._config = config
        self._clock = clock
        self._parser = make_parser(config, tokenizer)
        self._encode = Encoder(tokenizer).plain
        self._turns: list[Turn] = []
        self._calls = 0
        self._deadline = 0.0
        self._session: Session | None = None
        self._opened = contextlib.AsyncExitStack()

    @property
    def stop(self) -> tuple[str, ...]:
        return self._parser.stop

    @property
    def turns(self) -> tuple[Turn, ...]:
        return tuple(self._turns)

    async def reset(self) -> npt.NDArray[np.int32]:
        self._deadline = self._clock() + self._config.episode_seconds
        return np.asarray(self._prompt.token_ids, np.int32)

    async def step(self, action: Completion) -> npt.NDArray[np.int32] | End:
        token_ids = action.token_ids.tolist()
        # A stop string may be a special token (`</tool_call>`): it ends the call, not the sequence.
        ended = ends_a_sequence(token_ids, self._tokenizer) and self._tokenizer.decode(token_ids[-1:]) not in self.stop
        text = str(
            self._tokenizer.decode(
                token_ids[:-1] if ended else token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        parsed = self._parser.parse(text, ended=ended)
        if end := self._end(parsed, text, ended):
            return end
        if parsed.unfinished:
            self._turns.append(Turn((), void=False))
            return np.zeros(0, np.int32)
        calls: list[Call] = []
        try:
            results = [await self._answer(call, calls) for call in parsed.calls]
        finally:
            self._turns.append(Turn(tuple(calls), void=False))
        tokens = self._parser.render(text, results, ended=ended)
        if tokens is None:
            return End(Status.INEXACT, "the policy ended its response right after a call that is answered within it")
        return np.asarray(tokens, np.int32)

    async def close(self) -> None:
        await self._opened.aclose()

    def _end(self, parsed: Parsed, text: str, ended: bool) -> End | None:
        """How the episode ends before anything is run; None if it goes on."""
        end, void = None, False
        if not parsed.calls and not parsed.unfinished:
            void = not text.strip() or not re.search(self._config.final_answer, text)
            end = End(Status.COMPLETED)
        elif not ended and parsed.trailing.strip():
            # The token that completed the stop string brought more with it: what the policy would have written after
            # the call is in the stream before the result.
            end = End(Status.INEXACT, f"text after the end of a call: {parsed.trailing[:80]!r}")
        elif len(self._turns) + 1 >= self._config.max_turns:
            end = End(Status.TRUNCATED, f"{self._config.max_turns} turns")
        elif self._calls + len(parsed.calls) > self._config.max_calls:
            end = End(Status.TRUNCATED, f"{self._config.max_calls} calls")
        elif self._config.call_errors == "end" and any(isinstance(call, Malformed) for call in parsed.calls):
            self._turns.append(
                Turn(tuple(Call(c.tool, "", MALFORMED, 0.0) for c in parsed.calls if isinstance(c, Malformed)), False)
            )
            return End(Status.COMPLETED, "a call that cannot be read")
        if end is not None:
            self._turns.append(Turn((), void))
        return end

    async def _answer(self, call: Request | Malformed, calls: list[Call]) -> Sequence[int]:
        """Run a call; the tokens that are shown of its result. What it came to is appended to `calls`.

        Raises:
            EnvError: the tool failed and `tool_failures` is "mask", or the episode's time is over.
        """
        self._calls += 1
        if isinstance(call, Malformed):
            calls.append(Call(call.tool, "", MALFORMED, 0.0))
            return self._shown(f"Error: {call.error}")
        left = self._deadline - self._clock()
        if left <= 0:
            raise EnvError(f"env.episode_seconds = {self._config.episode_seconds:g} are over")
        result = await self._run(call.code, left)
        calls.append(Call(call.tool, call.code, result.status.value, result.wall_ms / 1000))
        if result.status is Outcome.LOST and self._config.tool_failures == "mask":
            raise EnvError(f"the tool failed: {result.stderr}")
        return self._shown(_text(result))

    async def _run(self, code: str, left: float) -> Result:
        began = time.monotonic()
        seconds = min(self._config.tool_seconds, left)
        try:
            # The box bounds the call; this, a box that hangs or does not get to it.
            async with asyncio.timeout(left):
                if not self._config.keep_state:
                    return await self._box.run(code, echo=self._config.echo, seconds=seconds)
                if self._session is None:
                    self._session = await self._opened.enter_async_context(self._box.session())
                return await self._session.run(code, echo=self._config.echo, seconds=seconds)
        except TimeoutError:
            return lost("no answer within the episode's time", 1000 * (time.monotonic() - began))

    def _shown(self, text: str) -> list[int]:
        """The tokens of a result, at most `max_observation_tokens`: of a longer one the beginning and the end."""
        encode, most = self._encode, self._config.max_observation_tokens
        near = most * _CHARACTERS_PER_TOKEN
        if len(text) > 2 * near:
            head, tail = encode(text[:near]), encode(text[-near:])
        else:
            head = tail = encode(text)
            if len(head) <= most:
                return head
        note = encode(_CUT)[:most]
        room = most - len(note)
        return [*head[: room - room // 2], *note, *tail[len(tail) - room // 2 :]]


def _make(prompt: Prompt, context: EnvContext[ToolUseConfig]) -> ToolUse:
    assert context.box
    return ToolUse(prompt, context.box, context.tokenizer, context.settings, context.clock)


def _check(context: EnvContext[ToolUseConfig]) -> None:
    """Raises: UserError: the tokenizer lacks what `env.parser` needs."""
    make_parser(context.settings, context.tokenizer)


ENV = EnvKind(
    make=_make,
    settings=ToolUseConfig,
    needs_sandbox=True,
    session_key="keep_state",
    statuses=frozenset({Status.COMPLETED, Status.TRUNCATED, Status.INEXACT}),
    check=_check,
)


def _text(result: Result) -> str:
    """A result as the policy sees it."""
    note = "" if result.status is Outcome.MEMORY and result.stderr else _NOTES.get(result.status, "")
    stderr = "" if result.status is Outcome.LOST else result.stderr
    parts = [part.rstrip("\n") for part in (result.stdout, result.value, stderr, note)]
    return "\n".join(part for part in parts if part) or _NOTHING
