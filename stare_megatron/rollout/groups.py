"""What an engine's process runs for each request, put together from the configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from stare_megatron import rewards
from stare_megatron.config import Config
from stare_megatron.config.env import EnvConfig
from stare_megatron.data.benchmarks import Benchmark
from stare_megatron.data.prompts import PromptSet
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.envs import ENVS, EnvContext
from stare_megatron.rewards.base import response_text
from stare_megatron.rollout import own
from stare_megatron.rollout.episode import Masks, run_group
from stare_megatron.rollout.reflection import word_counter
from stare_megatron.rollout.sampler import Sampler
from stare_megatron.rollout.under_way import GroupUnderWay
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Begun, Completion, Group, GroupRequest, GroupSummary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Runner:
    """Samples and scores groups, and tells what there is of those under way. Use it from one event loop.

    All trajectories of a group, and of all groups that run at once, are played as tasks of that loop: while one waits
    for its tool the engine samples others. `box`: an open sandbox that outlives it, for an environment with a tool or
    a reward that runs code. `clock`: that of its environments (`EnvContext`).

    Raises:
        UserError: no tokenizer in the checkpoint, or one without what the environment needs.
        ValueError: an environment or a reward that needs a sandbox, without a box.
    """

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        box: SandboxClient | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reward = own.with_culprit(config, rewards.make_reward(config.reward, box, config.sandbox))
        self._tokenizer = load_tokenizer(config.model.path, config.data.chat_template_kwargs)
        self._words = config.logging.reflection_words
        self._count = word_counter(self._words)
        self._kind = ENVS[config.env.name]
        if self._kind.needs_sandbox and box is None:
            raise ValueError(f"env.name = {config.env.name!r} needs a sandbox")
        check_env(config.env, self._tokenizer)
        self._context = EnvContext(config.env.settings, self._tokenizer, box, clock)
        self._make_env = own.env_with_culprit(config, lambda prompt: self._kind.make(prompt, self._context))
        self._masks = Masks(overlong=config.rollout.overlong == "mask", void=config.env.void_turns == "mask")
        self._sampler = sampler
        self._under_way: list[GroupUnderWay] = []

    async def __call__(self, request: GroupRequest, samples: Sequence[int] = ()) -> tuple[Group, GroupSummary]:
        """Sample and score one group, or those of it that `samples` name."""
        under_way = GroupUnderWay(request, samples)
        self._under_way.append(under_way)
        try:
            group = await run_group(
                request,
                make_env=self._make_env,
                sampler=self._sampler,
                reward=self._reward,
                tokenizer=self._tokenizer,
                masks=self._masks,
                statuses=self._kind.statuses,
                under_way=under_way,
            )
        finally:
            self._under_way.remove(under_way)
        # Here, where the tokens are: the driver gets the count.
        texts = [
            response_text(t, self._tokenizer, skip_special_tokens=True) if self._words else ""
            for t in group.trajectories
        ]
        return group, group.summary(tuple(map(self._count, texts)))

    def begun(self, drawn: Mapping[int, Completion]) -> dict[int, Begun]:
        """What there is of each group under way, by the seed of its request. `drawn`: what the engine has drawn so far
        of its requests, by their seeds."""
        return {group.seed: group.begun(drawn) for group in self._under_way}


def check_prompts(config: Config, prompts: PromptSet | None, benchmarks: Iterable[Benchmark]) -> None:
    """Raises:
    UserError: a prompt that the reward cannot grade.
    """
    files = {", ".join(map(str, config.data.train)): prompts} if prompts else {}
    for where, found in (files | {str(b.path): b.prompts for b in benchmarks}).items():
        rewards.check_prompts(config.reward, (found[i] for i in range(len(found))), where, config.sandbox)


def check_env(config: EnvConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises:
    UserError: the tokenizer lacks what the environment needs.
    """
    ENVS[config.name].check(EnvContext(config.settings, tokenizer))
