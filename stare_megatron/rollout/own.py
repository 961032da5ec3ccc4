"""What users bring: it is built once and its methods are checked before anything is started; what it raises later is
told as the user's."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt

from stare_megatron.config import Config
from stare_megatron.config.registry import is_address, source_file
from stare_megatron.config.reward import SumConfig
from stare_megatron.data.tokenizer import first_line
from stare_megatron.envs import ENVS, EnvContext
from stare_megatron.envs.base import End, Env, MakeEnv
from stare_megatron.errors import ORDINARY, RunError, UserError
from stare_megatron.rewards import PARTS, REWARDS, RewardContext, RewardKind
from stare_megatron.rewards.base import Reward
from stare_megatron.types import Completion, Prompt, Score, Status, Trajectory, Turn

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
    if not own:
        return reward
    cure = "where an answer cannot be graded raise RewardError, docs/adding_a_reward.md"
    return _OwnReward(reward, _Culprit([(found.key, found.name) for found in own], cure))


def env_with_culprit(config: Config, make: MakeEnv) -> MakeEnv:
    """The same for what makes the environments of episodes."""
    if not is_address(config.env.name):
        return make
    statuses = ENVS[config.env.name].statuses
    cure = "what an episode cannot go on from is an EnvError, docs/adding_an_environment.md"
    culprit = _Culprit([("env.name", config.env.name)], cure)

    def made(prompt: Prompt) -> Env:
        with culprit.named(prompt):
            return _OwnEnv(make(prompt), statuses, culprit, prompt)

    return made


class _Culprit:
    """Names what a user brought in the errors that it raises, given as pairs of key and address, which are loaded."""

    def __init__(self, own: list[tuple[str, str]], cure: str) -> None:
        self._own = ", ".join(f"{key} = {name!r}" for key, name in own)
        self._files = {str(source_file(name)) for _, name in own}
        self._cure = f"mend it; {cure}"
        self._told = False

    @contextlib.contextmanager
    def named(self, prompt: Prompt) -> Iterator[None]:
        """Raises: RunError: for a common exception; the first with its traceback on stderr, the engine's log."""
        try:
            yield
        except ORDINARY as e:
            if not self._told:  # all samples of a batch come here at about the same time
                traceback.print_exc()
            self._told = True
            lines = [
                f"{f.filename}:{f.lineno}: " for f in traceback.extract_tb(e.__traceback__) if f.filename in self._files
            ]
            said = f"{(lines or [''])[-1]}{type(e).__name__}: {first_line(e)}"
            where = f"{self._own}: {said}, for prompt {prompt.id!r}"
            raise RunError(f"{where}; {self._cure}; its log has the traceback") from e

    def returned(self, what: object, wanted: str, prompt: Prompt) -> RunError:
        return RunError(f"{self._own}: returned {what!r} for prompt {prompt.id!r}; want {wanted}; {self._cure}")


class _OwnReward:
    """A reward that is a user's, or has parts that are."""

    def __init__(self, reward: Reward, culprit: _Culprit) -> None:
        self._reward = reward
        self._culprit = culprit

    async def __call__(self, prompt: Prompt, trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase) -> Score:
        with self._culprit.named(prompt):
            score: object = await self._reward(prompt, trajectory, tokenizer)
        if not isinstance(score, Score):
            raise self._culprit.returned(score, "a Score", prompt)
        return score


class _OwnEnv:
    """An episode in an environment that is a user's."""

    def __init__(self, env: Env, statuses: frozenset[Status], culprit: _Culprit, prompt: Prompt) -> None:
        self._env = env
        self._statuses = statuses
        self._culprit = culprit
        self._prompt = prompt

    @property
    def stop(self) -> tuple[str, ...]:
        return self._env.stop

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._env.turns

    async def reset(self) -> npt.NDArray[np.int32]:
        with self._culprit.named(self._prompt):
            found: object = await self._env.reset()
        if not _are_tokens(found):
            raise self._culprit.returned(found, "the prompt's tokens from `reset`, int32 [n]", self._prompt)
        return found

    async def step(self, action: Completion) -> npt.NDArray[np.int32] | End:
        with self._culprit.named(self._prompt):
            found: object = await self._env.step(action)
        if _are_tokens(found) or (isinstance(found, End) and found.status in self._statuses):
            return found
        statuses = ", ".join(sorted(status.name for status in self._statuses))
        wanted = f"tokens, int32 [n], or an End from `step`, with a status of its EnvKind ({statuses})"
        raise self._culprit.returned(found, wanted, self._prompt)

    async def close(self) -> None:
        with self._culprit.named(self._prompt):
            await self._env.close()


def _are_tokens(found: object) -> TypeGuard[npt.NDArray[np.int32]]:
    return isinstance(found, np.ndarray) and found.dtype == np.int32 and found.ndim == 1


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
