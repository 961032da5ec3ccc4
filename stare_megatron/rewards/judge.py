"""A model as the judge, behind an OpenAI-compatible `/chat/completions`."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from stare_megatron.config.judge import PLACEHOLDERS, JudgeConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards.base import RewardContext, RewardError, RewardKind, nothing_to_check, response_text
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUSY = (408, 409, 425, 429)  # HTTP: not now; with all of 5xx
_DENIED = (401, 403)
_LONGEST_PAUSE = 60.0  # seconds, also where the server asks for more
_DOOR_SECONDS = 10.0
_OBJECTS = 32  # openings of JSON objects tried, from the last one
_RIGHT = ("yes", "true", "correct", "right", "pass")
_WRONG = ("no", "false", "incorrect", "wrong", "fail")
_PLACE = re.compile("{(" + "|".join(PLACEHOLDERS) + ")}")


class JudgeReward:
    """The judge's score between `lowest` and `highest`, as a reward from 0 to 1. What it cannot say (no answer in time,
    an answer without a score) is not graded."""

    def __init__(self, config: JudgeConfig) -> None:
        """Raises:
        UserError: the environment variable with the key is missing in this process.
        """
        self._config = config
        self._key = _key(config)
        self._verdict = re.compile(config.verdict, re.DOTALL)
        self._turns = asyncio.Semaphore(config.concurrency)
        self._client = _client(config, self._key)

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises:
        RewardError: no verdict.
        """
        c = self._config
        response = response_text(trajectory, tokenizer, skip_special_tokens=True)
        texts = {
            "problem": str(prompt.extra[c.problem_key]) if c.problem_key else prompt.text,
            "answer": prompt.answer,
            "response": response.rpartition(c.after)[2] if c.after else response,
        }
        # In one pass: what the policy wrote may hold placeholders of its own.
        content = _PLACE.sub(lambda match: texts[match[1]], c.template)
        async with self._turns:
            said = await self._ask(content)
        score = read_score(said, c, self._verdict)
        if score is None:
            raise RewardError(
                f"the judge's answer holds no score from {c.lowest:g} to {c.highest:g}: ...{said[-80:]!r}"
            )
        reward = (score - c.lowest) / (c.highest - c.lowest)
        passed = reward >= c.pass_mark
        note = f"judged {score:g}" if passed else f"judged {score:g}: ...{said[-80:]!r}"
        return Score(reward, passed, note)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, content: str) -> str:
        c = self._config
        messages = [{"role": "system", "content": c.system}] if c.system else []
        body = c.body | {
            "model": c.model,
            "messages": [*messages, {"role": "user", "content": content}],
            "max_tokens": c.judge_tokens,
            "temperature": c.judge_temperature,
        }
        sent = json.dumps(body).encode()  # in ASCII: a response may hold half a surrogate pair
        why = ""
        for attempt in range(c.attempts):
            pause = 2.0 ** (attempt - 1) if attempt else 0.0
            await asyncio.sleep(min(max(pause, _asked_pause(why)), _LONGEST_PAUSE) if attempt else 0.0)
            try:
                async with asyncio.timeout(c.judge_seconds):  # httpx bounds each read; this, the whole answer
                    answer = await self._client.post("chat/completions", content=sent)
            except TimeoutError:
                why = f"no answer within {c.judge_seconds:g} s"
                continue
            except httpx.HTTPError as e:
                why = f"{type(e).__name__}: {e}".rstrip(": ")
                continue
            if answer.status_code < 400:
                return _content(answer)
            why = self._told(answer)
            if answer.status_code not in _BUSY and answer.status_code < 500:
                raise RewardError(f"the judge refuses: {why}")
        raise RewardError(f"no verdict in {c.attempts} attempts: {why}")

    def _told(self, answer: httpx.Response) -> str:
        """What went wrong, without what could hold the key."""
        wait = answer.headers.get("retry-after", "")
        text = "" if answer.status_code in _DENIED else answer.text[:200]
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(filter(None, (f"HTTP {answer.status_code}", f"retry-after={wait}" if wait else "", text)))


def _asked_pause(why: str) -> float:
    found = re.search(r"retry-after=(\d{1,6})\b", why)
    return float(found[1]) if found else 0.0


def _key(config: JudgeConfig) -> str:
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            f"reward.api_key_env = {config.api_key_env!r}: that environment variable holds no key; set it, also where "
            "Ray was started on each node"
        )
    return key


def _client(config: JudgeConfig, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=config.url,
        headers=_headers(key),
        timeout=config.judge_seconds,
        limits=httpx.Limits(max_connections=config.concurrency),
        trust_env=False,  # a .netrc would replace the key
    )


def _headers(key: str) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _content(answer: httpx.Response) -> str:
    """Raises: RewardError: no chat completion."""
    try:
        content = answer.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise RewardError(f"the judge's answer is no chat completion: {answer.text[:80]!r}") from e
    if not isinstance(content, str):
        raise RewardError("the judge said nothing; raise reward.judge_tokens if it thinks first")
    return content


def read_score(said: str, config: JudgeConfig, verdict: re.Pattern[str]) -> float | None:
    """The score in the judge's answer, None without one in the range."""
    said = said.rpartition("</think>")[2]
    found = _in_json(said, config.json_key) if config.json_key else None
    if not config.json_key:
        matches = list(verdict.finditer(said))
        found = matches[-1][1 if verdict.groups else 0] if matches else None
    word = str(found).strip().lower() if isinstance(found, str | bool | int | float) else ""
    if word in _RIGHT or word in _WRONG:
        return config.highest if word in _RIGHT else config.lowest
    try:
        score = float(word)
    except ValueError:
        return None
    return score if math.isfinite(score) and config.lowest <= score <= config.highest else None


def _in_json(said: str, key: str) -> Any:
    """The value of the key in the last JSON object that has it, also within words or a fence."""
    end = len(said)
    for _ in range(_OBJECTS):
        end = said.rfind("{", 0, end)
        if end < 0:
            return None
        try:
            found, _ = json.JSONDecoder().raw_decode(said, end)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and key in found:
            return found[key]
    return None


@dataclass(frozen=True, kw_only=True)
class JudgeKind(RewardKind):
    """Its server must be there before anything is started."""

    make: Callable[[Any], JudgeReward] = JudgeReward

    def columns_of(self, settings: JudgeConfig) -> tuple[str, ...]:
        """The one with the problem, where one is named."""
        return (settings.problem_key,) if settings.problem_key else ()

    def checker(self, context: RewardContext) -> Callable[[Prompt], None]:
        """Raises:
        UserError: no key, nobody at the address, or the key is refused.
        """
        config: JudgeConfig = context.settings
        key = _key(config)
        cure = "start the server, or mend reward.url"
        try:  # whether it lists its models is its own affair; that it answers is enough
            url = f"{config.url.rstrip('/')}/models"
            answer = httpx.get(url, headers=_headers(key), timeout=_DOOR_SECONDS, trust_env=False)
        except httpx.HTTPError as e:
            raise UserError(f"reward.url = {config.url!r}: nobody answers ({type(e).__name__}: {e}); {cure}") from e
        if answer.status_code in _DENIED:
            wanted = f"the key in {config.api_key_env}" if key else "a request without a key: set reward.api_key_env"
            raise UserError(f"reward.url = {config.url!r}: the server refuses {wanted} (HTTP {answer.status_code})")
        return nothing_to_check


REWARD = JudgeKind(settings=JudgeConfig)
