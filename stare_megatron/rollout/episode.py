"""One episode -> Trajectory; all samples of a prompt -> Group."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from stare_megatron.data.tokenizer import decoder
from stare_megatron.envs.base import ENDS, End, Env, EnvError, MakeEnv
from stare_megatron.rewards.base import Reward, RewardError
from stare_megatron.rollout.sampler import SampleError, Sampler
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.rollout.under_way import GroupUnderWay
from stare_megatron.types import (
    Completion,
    Graded,
    Group,
    GroupRequest,
    Prompt,
    Sampling,
    Score,
    Span,
    SpanKind,
    Status,
    Trajectory,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Experts: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]] | None"


@dataclass(frozen=True)
class Masks:
    """Which trajectories are left out of the loss: those that a budget ended, those with a void turn.

    Example:
        Masks(overlong=False, void=True)
    """

    overlong: bool = False
    void: bool = False

    def settle(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory under the status it is trained with."""
        status = trajectory.status
        if self.overlong and status is Status.TRUNCATED:
            status = Status.OVERLONG
        elif self.void and status.is_trainable and trajectory.counts().void:
            status = Status.VOID
        return dataclasses.replace(trajectory, status=status)


NO_MASKS = Masks()
_NO_LOGPROBS = np.zeros(0, np.float32)


class _Stream:
    """The token stream of an episode while it grows."""

    def __init__(self, prompt: npt.NDArray[np.int32], budget: int) -> None:
        self.spans = [Span(SpanKind.PROMPT, prompt, _NO_LOGPROBS)]
        self.token_ids: list[int] = prompt.tolist()
        self.left = budget
        self.routed_experts: Experts = None

    def append(self, span: Span) -> None:
        self.spans.append(span)
        self.token_ids += span.token_ids.tolist()
        self.left -= len(span.token_ids)

    def sampled(self, completion: Completion) -> None:
        """A turn's request began with the stream so far, so its experts are those of all of it."""
        runs = completion.versions or ((completion.weight_version, len(completion.token_ids)),)
        self.append(Span(SpanKind.ACTION, completion.token_ids, completion.logprobs, runs))
        self.routed_experts = completion.routed_experts


async def run_episode(
    prompt: Prompt, sample: int, env: Env, sampler: Sampler, sampling: Sampling, statuses: frozenset[Status] = ENDS
) -> tuple[Trajectory, str]:
    """Play one episode: sample, observe, sample on, until the environment ends it or the tokens run out.

    `sampling.max_tokens` bounds the whole response, observations included; `sampling.seed` draws the first turn, and
    seeds derived from it the later ones. An `EnvError` or `SampleError` makes the trajectory FAILED; returned with it
    is that error's text, or what the environment says of its end. Other exceptions are bugs, or end the run: they
    propagate. The environment's stop strings are added to those of `sampling`.

    Raises:
        ValueError: the environment ends the episode with a status that is none of `statuses`.
    """
    stream = _Stream(np.asarray(prompt.token_ids, np.int32), sampling.max_tokens)
    versions: list[int] = []
    sampling = dataclasses.replace(sampling, stop=sampling.stop + env.stop)
    try:
        stream = _Stream(await env.reset(), sampling.max_tokens)
        end = await _turns(stream, versions, env, sampler, sampling, statuses)
    except (EnvError, SampleError) as e:
        end = End(Status.FAILED, f"{type(e).__name__}: {e}")
    finally:
        await env.close()
    versions = [version for span in stream.spans for version, _ in span.versions] or versions or [sampler.version]
    return Trajectory(
        prompt.id,
        sample,
        tuple(stream.spans),
        end.status,
        weight_versions=(min(versions), max(versions)),
        seed=sampling.seed,
        turns=env.turns,
        routed_experts=stream.routed_experts,
    ), end.note


async def _turns(
    stream: _Stream,
    versions: list[int],
    env: Env,
    sampler: Sampler,
    sampling: Sampling,
    statuses: frozenset[Status],
) -> End:
    while True:
        turn = len(versions)
        seed = derive_seed(sampling.seed, turn) if turn else sampling.seed
        completion = await sampler.sample(
            stream.token_ids, dataclasses.replace(sampling, max_tokens=stream.left, seed=seed)
        )
        versions.append(completion.weight_version)
        stream.sampled(completion)
        if completion.status is not Status.COMPLETED:
            return End(completion.status)
        observation = await env.step(completion)
        if isinstance(observation, End):
            if observation.status not in statuses:
                given = ", ".join(sorted(status.name for status in statuses))
                raise ValueError(
                    f"{type(env).__name__} ended an episode with {observation.status}; its kind's statuses: {given}"
                )
            return observation
        if len(observation) >= stream.left:  # no room for a token after it
            return End(Status.TRUNCATED)
        if len(observation):
            stream.append(Span(SpanKind.OBSERVATION, observation, _NO_LOGPROBS))


async def run_group(
    request: GroupRequest,
    *,
    make_env: MakeEnv,
    sampler: Sampler,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    masks: Masks = NO_MASKS,
    statuses: frozenset[Status] = ENDS,
    under_way: GroupUnderWay | None = None,
) -> Group:
    """Sample and score every trajectory of a group at once, from where `request.begun` left off. `under_way`, made of
    the request, says which of them, if not all, and tells meanwhile how far they have come.

    Sample i draws with `derive_seed(request.sampling.seed, i)`. A FAILED or INEXACT trajectory, and one whose reward
    raises `RewardError` and which becomes UNGRADED, are not graded: they score 0 with a note and carry no loss. Other
    exceptions cancel the group and propagate. `masks` apply after grading. `statuses`: as of `run_episode`.
    """

    way = under_way or GroupUnderWay(request)

    async def graded(sample: int) -> tuple[Trajectory, Score]:
        own = dataclasses.replace(request.sampling, seed=derive_seed(request.sampling.seed, sample))
        env = make_env(request.prompt)
        turn = way.first_turn(sampler, sample, decoder(tokenizer))
        trajectory, note = await run_episode(request.prompt, sample, env, turn, own, statuses)
        if trajectory.status in (Status.FAILED, Status.INEXACT):
            return trajectory, Score(0.0, False, note or "the engine failed the request", graded=False)
        try:
            score = await reward(request.prompt, trajectory, tokenizer)
        except RewardError as e:
            ungraded = dataclasses.replace(trajectory, status=Status.UNGRADED)
            return ungraded, Score(0.0, False, f"not graded: {e}", graded=False)
        return masks.settle(trajectory), score

    async def one(sample: int) -> tuple[Trajectory, Score]:
        if sample not in way.graded:
            way.graded[sample] = Graded(sample, *await graded(sample))
        return way.graded[sample].trajectory, way.graded[sample].score

    pairs = await _all(one(sample) for sample in way.samples)
    return Group(request.prompt, tuple(t for t, _ in pairs), tuple(s for _, s in pairs))


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first exception cancels the rest and is raised as itself (a TaskGroup would wrap it)."""
    running = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
