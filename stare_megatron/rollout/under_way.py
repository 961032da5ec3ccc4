"""What there is of a group while it is sampled, so that another process can go on with it.

A trajectory is the tokens that were drawn of it, and its first turn depends on nothing else than the prompt. So a first
turn is gone on with by a request whose prompt has the old tokens at its end, and which may draw what is left of the
budget: by other weights, maybe, as after a push that found it in flight. Later turns depend on what the environment has
become: those episodes start again. So do the first turns of an environment that begins otherwise than it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stare_megatron.rollout.sampler import Sampler
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.types import (
    Begun,
    Completion,
    Graded,
    GroupRequest,
    Partial,
    Sampling,
    Status,
    VersionRuns,
    merged_runs,
)

Decode = Callable[[list[int]], str]

_TOKENS_OF_A_CHARACTER = 4  # at most: bytes of UTF-8


class FirstTurn:
    """The sampler of one episode: its first turn goes on from what was drawn `before`, and can be looked at meanwhile.

    `decode`: token ids -> text, special tokens included.
    """

    def __init__(self, sampler: Sampler, sample: int, before: Partial | None, decode: Decode) -> None:
        self._sampler = sampler
        self._sample = sample
        self._before = before
        self._decode = decode
        self._turns = 0
        self._prompt: Sequence[int] = ()
        self._seed: int | None = None  # of the engine's request
        self._done: Completion | None = None

    @property
    def version(self) -> int:
        return self._sampler.version

    async def sample(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        """As `Sampler`."""
        self._turns += 1
        if self._turns > 1:
            return await self._sampler.sample(token_ids, sampling)
        self._prompt = tuple(token_ids)
        old = self._before
        if old is not None and not (
            np.array_equal(old.prompt_ids, token_ids) and (old.ended or len(old.drawn.token_ids) < sampling.max_tokens)
        ):
            old = self._before = None
        if old is None:
            self._seed = sampling.seed
            self._done = await self._sampler.sample(token_ids, sampling)
        elif old.ended:
            self._done = old.drawn
        else:
            drawn = len(old.drawn.token_ids)
            self._seed = derive_seed(sampling.seed, 0, drawn)
            left = dataclasses.replace(sampling, max_tokens=sampling.max_tokens - drawn, seed=self._seed)
            new = await self._sampler.sample([*token_ids, *old.drawn.token_ids.tolist()], left)
            self._done = stopped(joined(old.drawn, new), drawn, sampling.stop, self._decode)
        return self._done

    def partial(self, drawn: Mapping[int, Completion]) -> Partial | None:
        """What there is; None if nothing, or if it cannot be gone on with. `drawn`: what the engine has drawn so far of
        its requests, by their seeds."""
        if self._turns == 0:
            return self._before
        if self._turns > 1:
            return None
        prompt = np.asarray(self._prompt, np.int32)
        if self._done is not None:
            ended = self._done.status in (Status.COMPLETED, Status.TRUNCATED)
            return Partial(self._sample, prompt, self._done, ended=True) if ended else None
        new = drawn.get(self._seed) if self._seed is not None else None
        if new is None:
            return self._before
        old = self._before
        return Partial(self._sample, prompt, joined(old.drawn, new) if old else new, ended=False)


class GroupUnderWay:
    """A group while it is sampled, or those of it that `samples` name: which are `graded`, and the `turns` of those
    that have begun, by number."""

    def __init__(self, request: GroupRequest, samples: Sequence[int] = ()) -> None:
        self.seed = request.sampling.seed
        self.samples = tuple(samples) or tuple(range(request.group_size))
        self.graded: dict[int, Graded] = {of.sample: of for of in request.begun.graded if of.sample in self.samples}
        self.turns: dict[int, FirstTurn] = {}
        self._before = {of.sample: of for of in request.begun.partial if of.sample in self.samples}

    def first_turn(self, sampler: Sampler, sample: int, decode: Decode) -> FirstTurn:
        """The sampler of a sample's episode."""
        self.turns[sample] = FirstTurn(sampler, sample, self._before.get(sample), decode)
        return self.turns[sample]

    def begun(self, drawn: Mapping[int, Completion]) -> Begun:
        """`drawn`: as of `FirstTurn.partial`."""
        graded = tuple(self.graded[n] for n in sorted(self.graded))
        open_ = sorted({*self._before, *self.turns} - self.graded.keys())
        partial = [self.turns[n].partial(drawn) if n in self.turns else self._before[n] for n in open_]
        return Begun(graded, tuple(p for p in partial if p is not None))


def joined(old: Completion, new: Completion) -> Completion:
    """One completion of two parts, of which the second went on from the first."""
    return Completion(
        token_ids=np.concatenate([old.token_ids, new.token_ids]),
        logprobs=np.concatenate([old.logprobs, new.logprobs]),
        status=new.status,
        weight_version=old.weight_version if len(old.token_ids) else new.weight_version,
        routed_experts=new.routed_experts,
        versions=merged_runs((*_runs(old), *_runs(new))),
    )


def stopped(whole: Completion, first: int, stop: Sequence[str], decode: Decode) -> Completion:
    """`whole`, or as much of it as there would be had stop strings been looked for where its `first` tokens end and the
    others begin: the engine sees what it is asked to draw, and no string that begins before that."""
    longest = max(map(len, stop), default=0)
    if not longest:
        return whole
    near = whole.token_ids[max(0, first - _TOKENS_OF_A_CHARACTER * longest) : first].tolist()
    known = len(decode(near))
    for n, token in enumerate(whole.token_ids[first:].tolist(), start=1):
        near.append(token)
        text = decode(near)
        if any(s in text for s in stop):
            return _cut(whole, first + n)
        if len(text) >= known + longest + _TOKENS_OF_A_CHARACTER:  # what comes later begins later
            break
    return whole


def _cut(whole: Completion, tokens: int) -> Completion:
    """Its first tokens, as a completion that a stop string ended."""
    if tokens == len(whole.token_ids):
        return dataclasses.replace(whole, status=Status.COMPLETED)
    left, runs = tokens, []
    for version, n in _runs(whole):
        runs.append((version, min(n, left)))
        left -= runs[-1][1]
    return dataclasses.replace(
        whole,
        token_ids=whole.token_ids[:tokens],
        logprobs=whole.logprobs[:tokens],
        status=Status.COMPLETED,
        versions=tuple(run for run in runs if run[1]),
    )


def _runs(completion: Completion) -> VersionRuns:
    return completion.versions or ((completion.weight_version, len(completion.token_ids)),)
