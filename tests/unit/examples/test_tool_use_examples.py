"""The tool-use examples: valid settings; the large one laid out for a model of Qwen2.5-7B's shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stare_megatron import config, tasks
from stare_megatron.config.env import ToolUseConfig
from stare_megatron.envs.tool_use import ToolUse
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import preflight
from stare_megatron.sandbox.result import Result, Status
from stare_megatron.tasks.base import TaskPrompt
from stare_megatron.tasks.tiny_model import make_tokenizer
from tests.contracts.source import ROOT

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}


def test_the_large_example_fits_qwen_7b(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    made = config.load(ROOT / "examples/tool_use_7b/run.toml", [f"model.path={tmp_path}"])
    shape = read_hf_config(tmp_path)
    preflight.check_layout(made, shape)
    preflight.check_window(made, shape)
    preflight.check_engine_options(made, shape)
    assert preflight.check_sandbox(made) == "4 actors of 16 workers, at level landlock or stronger"
    assert isinstance(made.env.settings, ToolUseConfig)
    settings = made.env.settings
    assert made.rollout.max_response_tokens > settings.max_calls * settings.max_observation_tokens


@pytest.mark.parametrize("call", ["<code>print(347*582)</code>", "<code>h=582*347\nprint(h)</code>"])
def test_the_warm_up_saw_what_the_environment_writes(call: str):
    """The tool of the generated task and the environment of the small example answer alike, byte for byte."""
    import asyncio

    import numpy as np

    from stare_megatron.types import Completion, Prompt
    from stare_megatron.types import Status as End

    class Interpreter:
        async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = 0.0) -> Result:
            return Result(Status.OK, "201954\n", "", "", 0, 1.0, 1.0)

    made = config.load(ROOT / "examples/tool_use_cpu/run.toml", [])
    assert isinstance(made.env.settings, ToolUseConfig)
    task = tasks.get(made.reward.name)
    tokenizer = make_tokenizer(task)
    prompt = TaskPrompt("p", "347*582=", "201954")
    ids = tokenizer.encode(call, add_special_tokens=False)
    env = ToolUse(
        Prompt(prompt.id, "s", prompt.text, tuple(tokenizer.encode(prompt.text)), prompt.answer),
        Interpreter(),  # type: ignore[arg-type]
        tokenizer,
        made.env.settings,
    )

    async def answer():
        await env.reset()
        return await env.step(
            Completion(np.asarray(ids, np.int32), np.zeros(len(ids), np.float32), End.COMPLETED, weight_version=0)
        )

    shown = asyncio.run(answer())
    assert task.tool is not None
    assert tokenizer.decode(shown) == task.tool.answer(call)
    assert env.turns[0].calls[0].code == call.removeprefix("<code>").removesuffix("</code>")
