"""What users bring: it is built once and its methods are checked before anything is started; what a reward raises later
is told as the user's."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stare_megatron.config import Config
from stare_megatron.config.registry import is_address
from stare_megatron.config.reward import SumConfig
from stare_megatron.data.tokenizer import first_line
from stare_megatron.envs import ENVS, EnvContext
from stare_megatron.errors import ORDINARY, RunError, UserError
from stare_megatron.rewards import PARTS, REWARDS, RewardContext, RewardKind
from stare_megatron.rewards.base import Reward
from stare_megatron.types import Prompt, Score, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments beside `self`.
_VERBS = {"reset": "(self)", "step": "(self, action)", "close": "(self)"}
_GRADES = "async def __call__(self, prompt, trajectory, tokenizer) -> Score"


def check_own(config: Config, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    """Build the user's environment for `prompt` and the user's rewards, unless they need an open sandbox: of these only
    the class is looked at. What belongs to this package is taken as it is.

    Raises:
        UserError: it cannot be built, or lacks what a run calls; names the page.
    """
    if is_address(config.env.name):
        _check_env(config, tokenizer, prompt)
    for reward in _rewards(config):
        if is_address(reward.name):
            _check_reward(reward, config)


def _check_env(config: Config, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> None:
    kind, where = ENVS[config.env.name], f"env.name = {config.env.name!r}"
    page = "docs/adding_an_environment.md"
    if kind.needs_sandbox:
        made: object = kind.make
        if not isinstance(made, type):
            return
    else:
        context = EnvContext(config.env.settings, tokenizer)
        made = _built(lambda: kind.make(prompt, context), f"{where}: make(prompt, context)", page)
    what = _named(made)
    for verb, arguments in _VERBS.items():
        wants = f"want `async def {verb}{arguments}`, {page}"
        if not hasattr(made, verb):
            raise UserError(f"{where}: {what} has no {verb!r}; {wants}")
        if not is_async(getattr(made, verb)):
            raise UserError(f"{where}: {verb!r} of {what} is not async; {wants}")
        count = arguments.count(",") + isinstance(made, type)
        if not _takes(getattr(made, verb), count):
            raise UserError(f"{where}: {verb!r} of {what} takes other arguments; {wants}")
    if isinstance(made, type):  # attributes may be those of an episode
        return
    for name, wants in (("stop", "a tuple of texts, () for none"), ("turns", "a tuple of Turn, () for none")):
        if not hasattr(made, name) or not isinstance(getattr(made, name), tuple):
            raise UserError(f"{where}: {what} has no {name!r} that is {wants}; {page}")


@dataclass(frozen=True)
class _Reward:
    """A reward of the run: the key that names it, its name there, and what it is."""

    key: str
    name: str
    kind: RewardKind
    settings: Any


def _rewards(config: Config) -> Iterator[_Reward]:
    """That of `reward.name`, and the parts of a sum."""
    reward = config.reward
    if isinstance(reward.settings, SumConfig):
        for part in reward.settings.parts:
            yield _Reward(f"reward.parts {part.called!r}: name", part.name, PARTS[part.name], part.settings)
    else:
        yield _Reward("reward.name", reward.name, REWARDS[reward.name], reward.settings)


def _check_reward(reward: _Reward, config: Config) -> None:
    where, page = f"{reward.key} = {reward.name!r}", "docs/adding_a_reward.md"
    if reward.kind.runs_code(reward.settings):
        made: object = reward.kind.make
        if not isinstance(made, type):
            return
    else:
        context = RewardContext(reward.settings, sandbox=config.sandbox)
        made = _built(lambda: reward.kind.build(context), f"{where}: make(settings)", page)
    grade, what = (made.__call__ if isinstance(made, type) else made), _named(made)
    if not callable(made) or not is_async(grade):
        raise UserError(f"{where}: {what} cannot be awaited to grade a trajectory; want `{_GRADES}`, {page}")
    if not _takes(grade, 3 + isinstance(made, type)):
        raise UserError(f"{where}: {what} takes other arguments; want `{_GRADES}`, {page}")


def with_culprit(config: Config, reward: Reward) -> Reward:
    """`reward`, made as `config` says, so that what goes wrong in a user's file names it. Rewards of this package are
    taken as they are."""
    own = [found for found in _rewards(config) if is_address(found.name)]
    return _Culprit(reward, own) if own else reward


class _Culprit:
    """A reward that is a user's, or has parts that are."""

    def __init__(self, reward: Reward, own: list[_Reward]) -> None:
        self._reward = reward
        self._own = ", ".join(f"{found.key} = {found.name!r}" for found in own)
        self._told = False
        self._files = {found.name.rpartition(":")[0] for found in own}

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        """Raises: RunError: an exception other than `RewardError`, the first with its traceback on stderr, the engine's
        log; or something that is no `Score`."""
        cure = "mend it; where an answer cannot be graded raise RewardError, docs/adding_a_reward.md"
        try:
            score: object = await self._reward(prompt, trajectory, tokenizer)
        except ORDINARY as e:
            if not self._told:  # all samples of a batch are graded at about the same time
                traceback.print_exc()
            self._told = True
            lines = [
                f"{f.filename}:{f.lineno}: " for f in traceback.extract_tb(e.__traceback__) if f.filename in self._files
            ]
            said = f"{(lines or [''])[-1]}{type(e).__name__}: {first_line(e)}"
            raise RunError(f"{self._own}: {said}, for prompt {prompt.id!r}; {cure}; its log has the traceback") from e
        if not isinstance(score, Score):
            raise RunError(f"{self._own}: returned {score!r} for prompt {prompt.id!r}; want a Score; {cure}")
        return score


def _built(make: Callable[[], object], what: str, page: str) -> object:
    try:
        return make()
    except ORDINARY as e:
        raise UserError(f"{what} raised {type(e).__name__}: {e}; {page} says what it is given") from e


def is_async(found: object) -> bool:
    """Whether a call of it is awaited: an async function, method or object, behind decorators too."""
    if not callable(found):
        return False
    inner = inspect.unwrap(found)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inspect.unwrap(type(inner).__call__))


def _takes(found: Any, count: int) -> bool:
    try:
        inspect.signature(found).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # no signature to be read
        return True
    return True


def _named(made: object) -> str:
    return made.__name__ if isinstance(made, type) else f"a {type(made).__name__}"
