"""What an engine's process runs for each request, put together from the configuration."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from stare_megatron.config import Config
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.envs.single_turn import SingleTurn
from stare_megatron.rewards import make_reward
from stare_megatron.rollout.episode import run_group
from stare_megatron.rollout.sampler import Sampler
from stare_megatron.types import Group, GroupRequest, Sampling


def make_runner(config: Config, sampler: Sampler) -> Callable[[GroupRequest], Awaitable[Group]]:
    """A function that samples and scores one group. Use it from one event loop.

    Raises:
        UserError: no tokenizer in the checkpoint, or an unknown reward.
    """
    r = config.rollout
    return functools.partial(
        run_group,
        make_env=SingleTurn,
        sampler=sampler,
        sampling=Sampling(r.max_response_tokens, r.temperature, r.top_p, tuple(r.stop), seed=0),
        reward=make_reward(config.reward.name),
        tokenizer=load_tokenizer(config.model.path),
    )
