"""Episodes with the sandbox that runs model-written code."""

from __future__ import annotations

import asyncio
import json

import numpy as np

from stare_megatron.config.env import ToolUseConfig
from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.envs.tool_use import ToolUse
from stare_megatron.rollout.episode import run_episode
from stare_megatron.sandbox.client import open_sandbox
from stare_megatron.types import Completion, Prompt, Sampling, SpanKind, Status
from tests import byte_tokenizer

TOKENIZER = byte_tokenizer.make()
PROMPT = Prompt("p", "s", "q", (40, 41), "")


class Script:
    version = 1

    def __init__(self, *codes: str) -> None:
        calls = [json.dumps({"name": "python", "arguments": {"code": code}}) for code in codes]
        self._texts = [*(f"<tool_call>{call}</tool_call>" for call in calls), "done<|im_end|>"]

    async def sample(self, token_ids, sampling) -> Completion:
        ids = np.array(TOKENIZER.encode(self._texts.pop(0)), np.int32)
        return Completion(ids, np.zeros(len(ids), np.float32), Status.COMPLETED, 1)


def play(codes: tuple[str, ...], **settings) -> tuple[list[str], list[str]]:
    """What the policy was shown, and how its calls ended."""

    async def main():
        sandbox = SandboxConfig(require="limits", workers=1, wall_seconds=60, cpu_seconds=20, preload=[])
        async with open_sandbox(sandbox) as box:
            env = ToolUse(PROMPT, box, TOKENIZER, ToolUseConfig.model_validate(settings))
            return (await run_episode(PROMPT, 0, env, Script(*codes), Sampling(6000, 1.0, 1.0, (), 0)))[0]

    trajectory = asyncio.run(main())
    assert trajectory.status is Status.COMPLETED
    shown = [TOKENIZER.decode(s.token_ids.tolist()) for s in trajectory.spans if s.kind is SpanKind.OBSERVATION]
    results = [s.partition("<tool_response>\n")[2].partition("\n</tool_response>")[0] for s in shown]
    return results, [call.outcome for turn in trajectory.turns for call in turn.calls]


def test_state_is_kept_or_not_as_set():
    codes = ("x = 6 * 7", "print('x is', x)\nx + 1", "raise ValueError('no')", "import time; time.sleep(60)", "x")
    shown, outcomes = play(codes, keep_state=True, tool_seconds=8)
    assert shown[:2] == ["[no output]", "x is 42\n43"]
    assert shown[2].endswith("ValueError: no")
    assert shown[3] == "[stopped: it took too long]"
    assert "the state was reset" in shown[4]  # the cell before did not answer
    assert outcomes == ["ok", "ok", "error", "timeout", "error"]
    shown, outcomes = play(codes[:2])
    assert "NameError" in shown[1]
    assert outcomes == ["ok", "error"]
