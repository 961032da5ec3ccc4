"""What an engine makes of the experts in vLLM's own output type. No engine of a CPU returns any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stare_megatron.config import InferenceConfig
from stare_megatron.errors import RunError
from stare_megatron.inference.engine import Engine
from stare_megatron.types import Completion, Sampling, Status

SAMPLING = Sampling(max_tokens=2, temperature=1.0, top_p=1.0, stop=(), seed=0)


class Answers:
    """In vLLM's place: two tokens after a prompt, with these experts."""

    def __init__(self, routed: np.ndarray[Any, Any] | None, reason: str) -> None:
        self._routed, self._reason = routed, reason

    async def generate(self, prompt: Any, params: Any, name: str, priority: int) -> AsyncIterator[Any]:
        from vllm.logprobs import FlatLogprobs
        from vllm.outputs import CompletionOutput, RequestOutput

        logprobs = FlatLogprobs()
        logprobs.logprobs = [-0.1, -0.2]
        one = CompletionOutput(
            index=0,
            text="",
            token_ids=[7, 8],
            cumulative_logprob=None,
            logprobs=logprobs,
            finish_reason=self._reason,
            routed_experts=self._routed,
        )
        yield RequestOutput(name, None, prompt["prompt_token_ids"], None, [one], finished=True)


def sample(routed: np.ndarray[Any, Any] | None, *, replay: bool = True, reason: str = "length") -> Completion:
    engine = Engine("engine 0", Path("m"), "bfloat16", InferenceConfig(routing_replay=replay), 32, 0, "gloo")
    engine._llm = Answers(routed, reason)  # type: ignore[assignment]
    return asyncio.run(engine.sample([3, 4, 5], SAMPLING))


def test_experts_of_all_tokens_but_the_last_come_along():
    routed = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2)
    assert sample(routed).routed_experts is routed
    assert sample(routed, replay=False).routed_experts is None


def test_missing_experts_end_the_run():
    with pytest.raises(RunError, match="engine 0: experts of 0 tokens came where 4 were read"):
        sample(None)
    with pytest.raises(RunError, match="experts of 3 tokens came where 4 were read"):
        sample(np.zeros((3, 2, 2), np.uint8))


def test_a_failed_request_needs_none():
    assert sample(None, reason="abort").status is Status.FAILED
