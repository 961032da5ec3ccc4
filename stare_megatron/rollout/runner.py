"""What an engine's process runs for each request, put together from the configuration."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from stare_megatron.config import Config
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.envs.single_turn import SingleTurn
from stare_megatron.rewards import make_reward
from stare_megatron.rewards.base import response_text
from stare_megatron.rollout.episode import run_group
from stare_megatron.rollout.reflection import word_counter
from stare_megatron.rollout.sampler import Sampler
from stare_megatron.types import Group, GroupRequest, GroupSummary


def make_runner(config: Config, sampler: Sampler) -> Callable[[GroupRequest], Awaitable[tuple[Group, GroupSummary]]]:
    """A function that samples and scores one group. Use it from one event loop.

    Raises:
        UserError: no tokenizer in the checkpoint, or an unknown reward.
    """
    reward = make_reward(config.reward)
    tokenizer = load_tokenizer(config.model.path)
    words = config.logging.reflection_words
    count = word_counter(words)

    async def run(request: GroupRequest) -> tuple[Group, GroupSummary]:
        group = await run_group(request, make_env=SingleTurn, sampler=sampler, reward=reward, tokenizer=tokenizer)
        # Here, where the tokens are: the driver gets the count.
        texts = [response_text(t, tokenizer, skip_special_tokens=True) if words else "" for t in group.trajectories]
        return group, group.summary(tuple(map(count, texts)))

    return run
