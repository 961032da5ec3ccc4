"""The judge against a real OpenAI-compatible server: vLLM's own, on a CPU, with a tiny model whose text is nonsense.

What is held is that the server takes the request, and that what cannot be read, or does not come in time, is not
graded.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from stare_megatron import tasks
from stare_megatron.config import RewardConfig
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.rewards import RewardError, check_prompts, make_reward
from stare_megatron.tasks.tiny_model import default_settings, make_model, make_tokenizer, save
from stare_megatron.types import Score
from tests.unit.rewards.test_rewards import PROMPT, Text, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "sk-of-the-test"
START_S = 400
TABLE = {
    "name": "judge", "model": "judge", "api_key_env": "TEST_JUDGE_KEY", "judge_tokens": 16, "attempts": 1,
    "template": "{response}",
}  # fmt: skip
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}="


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    folder = tmp_path_factory.mktemp("judge")
    settings = dataclasses.replace(default_settings("tool_arithmetic", layers=2, seed=1), max_batches=0)
    save(make_model(settings), make_tokenizer(tasks.get("tool_arithmetic")), folder / "model")
    (folder / "chat.jinja").write_text(CHAT)
    number = port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--served-model-name", "judge", "--host", "127.0.0.1", "--port", str(number), "--api-key", KEY]
    command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--chat-template", str(folder / "chat.jinja"), "--kv-cache-memory-bytes", str(64 * 2**20)]
    own = os.environ | device.engine_environment()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    url = f"http://127.0.0.1:{number}"
    deadline = time.monotonic() + START_S
    try:
        while not healthy(url):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(1)
        yield f"{url}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def judged(url: str, **settings: Any) -> Score:
    reward: Any = make_reward(RewardConfig.model_validate(TABLE | {"url": url} | settings))
    text: Any = Text("123")

    async def main() -> Score:
        try:
            return await reward(PROMPT, written("1"), text)
        finally:
            await reward.close()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)


def test_the_request_is_one_that_it_takes(server: str) -> None:
    """With every field that ours may have, and further ones. A grammar lets the model say nothing but a verdict."""
    check_prompts(RewardConfig.model_validate(TABLE | {"url": server}), [PROMPT], "data.train")
    further = {"seed": 3, "top_p": 0.9, "chat_template_kwargs": {"enable_thinking": False}}
    for said, reward in (("Score: 1", 1.0), ("Score: 0", 0.0)):
        body = further | {"structured_outputs": {"choice": [said]}}
        score = judged(server, system="be fair", judge_temperature=0.5, body=body)
        assert (score.reward, score.correct) == (reward, reward == 1.0)


def test_an_answer_that_cannot_be_read_is_not_graded(server: str) -> None:
    with pytest.raises(RewardError, match=r"the judge's answer holds no score from 0 to 1"):
        judged(server)


def test_an_answer_that_does_not_come_in_time_is_not_graded(server: str) -> None:
    with pytest.raises(RewardError, match=r"no verdict in 2 attempts: no answer within 0\.001 s"):
        judged(server, judge_seconds=0.001, attempts=2)


def test_what_it_refuses_is_said(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match=r"the judge refuses: HTTP 404.*does not exist"):
        judged(server, model="other")
    with pytest.raises(RewardError, match=r"the judge refuses: HTTP 400"):
        judged(server, judge_tokens=100_000)
    monkeypatch.setenv("TEST_JUDGE_KEY", "another")
    with pytest.raises(RewardError, match=r"the judge refuses: HTTP 401"):
        judged(server)
    with pytest.raises(UserError, match=r"the server refuses the key in TEST_JUDGE_KEY"):
        check_prompts(RewardConfig.model_validate(TABLE | {"url": server}), [PROMPT], "data.train")
