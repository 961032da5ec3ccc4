"""What an engine's process runs for each request, put together from the configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from stare_megatron import rewards
from stare_megatron.config import Config
from stare_megatron.config.env import EnvConfig
from stare_megatron.data.benchmarks import Benchmark
from stare_megatron.data.prompts import PromptSet
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.envs import ENVS, EnvContext
from stare_megatron.rewards.base import response_text
from stare_megatron.rollout.episode import Masks, run_group
from stare_megatron.rollout.reflection import word_counter
from stare_megatron.rollout.sampler import Sampler
from stare_megatron.sandbox.client import SandboxClient
from stare_megatron.types import Group, GroupRequest, GroupSummary, RunGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_runner(config: Config, sampler: Sampler, box: SandboxClient | None = None) -> RunGroup:
    """A function that samples and scores one group. Use it from one event loop.

    All trajectories of a group, and of all groups that run at once, are played as tasks of that loop: while one waits
    for its tool the engine samples others. `box`: an open sandbox that outlives the function, for an environment with
    a tool or a reward that runs code.

    Raises:
        UserError: no tokenizer in the checkpoint, or one without what the environment needs.
        ValueError: an environment or a reward that needs a sandbox, without a box.
    """
    reward = rewards.make_reward(config.reward, box, config.sandbox)
    tokenizer = load_tokenizer(config.model.path)
    words = config.logging.reflection_words
    count = word_counter(words)
    kind = ENVS[config.env.name]
    if kind.needs_sandbox and box is None:
        raise ValueError(f"env.name = {config.env.name!r} needs a sandbox")
    check_env(config.env, tokenizer)
    context = EnvContext(config.env.settings, tokenizer, box)
    masks = Masks(overlong=config.rollout.overlong == "mask", void=config.env.void_turns == "mask")

    async def run(request: GroupRequest, samples: Sequence[int] = ()) -> tuple[Group, GroupSummary]:
        group = await run_group(
            request,
            make_env=lambda prompt: kind.make(prompt, context),
            sampler=sampler,
            reward=reward,
            tokenizer=tokenizer,
            masks=masks,
            statuses=kind.statuses,
            samples=samples,
        )
        # Here, where the tokens are: the driver gets the count.
        texts = [response_text(t, tokenizer, skip_special_tokens=True) if words else "" for t in group.trajectories]
        return group, group.summary(tuple(map(count, texts)))

    return run


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
