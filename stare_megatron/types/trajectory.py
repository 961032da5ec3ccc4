"""A sampled token stream and what it is made of; `types.py` shows them with everything else that flows in a step."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

VersionRuns: TypeAlias = "tuple[tuple[int, int], ...]"
"""Which policy versions drew the tokens of a stretch, in order: (version, how many tokens)."""
Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def merged_runs(runs: Iterable[tuple[int, int]]) -> VersionRuns:
    """The same versions with neighbours that are equal as one stretch, and none without a token."""
    together = itertools.groupby(((version, n) for version, n in runs if n), key=lambda run: run[0])
    return tuple((version, sum(n for _, n in parts)) for version, parts in together)


class SpanKind(enum.Enum):
    """Who wrote a span: the data set, the policy, or the environment (tool output)."""

    PROMPT = "prompt"
    ACTION = "action"
    OBSERVATION = "observation"


class Status(enum.Enum):
    """How a trajectory ended."""

    COMPLETED = "completed"  # the policy stopped by itself
    TRUNCATED = "truncated"  # the token, turn or call budget ended it
    FAILED = "failed"  # the environment or the engine failed it; carries no loss
    UNGRADED = "ungraded"  # the reward could not grade it; carries no loss
    INEXACT = "inexact"  # it could not be continued from exactly the sampled tokens; carries no loss
    VOID = "void"  # a turn of it has neither a call nor a final answer, and the run leaves such out of the loss
    OVERLONG = "overlong"  # truncated, and the run leaves such out of the loss

    @property
    def is_trainable(self) -> bool:
        """Whether the trajectory is learned from: its reward says something about the policy, and no setting of the run
        leaves it out."""
        return self in (Status.COMPLETED, Status.TRUNCATED)

    @property
    def is_truncated(self) -> bool:
        """Whether a budget ended it."""
        return self in (Status.TRUNCATED, Status.OVERLONG)


@dataclass(frozen=True)
class Prompt:
    """One row of a data set, tokenised. `extra`: the columns of `data.extra_keys`, as JSON has them.

    Example:
        Prompt(id="sum-00017", source="order_free_sum", text="3 9 4 1 :", token_ids=(1, 15, 21, 16, 13, 5), answer="17")
    """

    id: str
    source: str
    text: str
    token_ids: tuple[int, ...]
    answer: str
    extra: Mapping[str, Json] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id}: no tokens")


@dataclass(frozen=True)
class Sampling:
    """How one completion is drawn. `stop` strings end it and stay in it; the end-of-sequence token always ends it.

    Example:
        Sampling(max_tokens=64, temperature=1.0, top_p=1.0, stop=(), seed=71)
    """

    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int


@dataclass(frozen=True, eq=False)
class Completion:
    """What an engine sampled for one request: `token_ids` int32 [n], `logprobs` float32 [n] (raw, natural log).

    `status` is COMPLETED (end-of-sequence or stop string), TRUNCATED (token budget) or FAILED; `weight_version` is the
    policy version of the first token, and `versions` those of all; empty: the same. `routed_experts`: as of a
    `Trajectory`, from the request's first token on.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    status: Status
    weight_version: int
    routed_experts: npt.NDArray[np.unsignedinteger[Any]] | None = None
    versions: VersionRuns = ()


@dataclass(frozen=True, eq=False)
class Span:
    """A run of tokens of one kind, exactly as the engine saw them.

    `token_ids` int32 [n]. `logprobs` float32 [n], natural log, under the sampling policy at temperature 1 before
    top-p (vLLM's raw log-probs), and `versions` of an ACTION's tokens; both empty unless `kind` is ACTION.

    Example:
        Span(SpanKind.ACTION, np.array([7, 9, 2], np.int32), np.array([-0.1, -1.2, -0.01], np.float32), ((3, 3),))
    """

    kind: SpanKind
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    versions: VersionRuns = ()

    def __post_init__(self) -> None:
        if self.token_ids.dtype != np.int32 or self.token_ids.ndim != 1:
            raise ValueError(f"span token_ids must be int32 [n], got {self.token_ids.dtype} {self.token_ids.shape}")
        if self.logprobs.dtype != np.float32 or self.logprobs.ndim != 1:
            raise ValueError(f"span logprobs must be float32 [n], got {self.logprobs.dtype} {self.logprobs.shape}")
        want = len(self.token_ids) if self.kind is SpanKind.ACTION else 0
        if len(self.logprobs) != want:
            raise ValueError(
                f"{self.kind.value} span of {len(self.token_ids)} tokens has {len(self.logprobs)} logprobs"
            )
        if self.versions and sum(tokens for _, tokens in self.versions) != want:
            raise ValueError(f"{self.kind.value} span of {len(self.token_ids)} tokens has versions {self.versions}")


@dataclass(frozen=True)
class Call:
    """One tool call: what was asked for, and how it ended.

    `tool`: its name; `code`: what it was given, "" if the call could not be read; `outcome`: "ok", the sandbox's word
    for how the code ended ("error", "timeout", ...), or "malformed"; `seconds`: wall-clock time the tool took, without
    waiting for its turn.

    Example:
        Call("python", "print(2 ** 70)", "ok", 0.004)
    """

    tool: str
    code: str
    outcome: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the code was run and came to its end."""
        return self.outcome == "ok"


@dataclass(frozen=True)
class Turn:
    """What the environment made of one action span. `void`: it is over without a call and without a final answer.

    Example:
        Turn((Call("python", "print(2 ** 70)", "ok", 0.004),), void=False)
    """

    calls: tuple[Call, ...]
    void: bool


@dataclass(frozen=True)
class EpisodeCounts:
    """A trajectory in numbers. `turns`: action spans; `call_errors`: calls that did not end well, malformed ones among
    them; `tool_seconds`: sum over its calls; `void`: one of its turns is.

    Example:
        EpisodeCounts(turns=3, calls=2, call_errors=1, tool_seconds=0.012, observation_tokens=58, void=False)
    """

    turns: int
    calls: int
    call_errors: int
    tool_seconds: float
    observation_tokens: int
    void: bool


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled token stream: a prompt span, then action and observation spans in the order they happened.

    `weight_versions`: the oldest and the newest policy version that drew a token of it. `seed`: the sampling seed.
    `turns`: what an environment with tools made of the action spans, in their order; a last span that a budget or a
    failure ended was not shown to it and has none. Empty in other environments. `routed_experts`: the experts that the
    engine sent the first m tokens to, unsigned integers [m, layers, top_k]; at least all but the last action token and
    what follows it. None: not asked for.

    Example:
        Trajectory("sum-00017", 0, (prompt_span, action_span), Status.COMPLETED, weight_versions=(3, 3), seed=71)
    """

    prompt_id: str
    sample: int
    spans: tuple[Span, ...]
    status: Status
    weight_versions: tuple[int, int]
    seed: int
    turns: tuple[Turn, ...] = ()
    routed_experts: npt.NDArray[np.unsignedinteger[Any]] | None = None

    def __post_init__(self) -> None:
        if not self.spans or self.spans[0].kind is not SpanKind.PROMPT:
            raise ValueError(f"trajectory {self.prompt_id}/{self.sample} must begin with its prompt span")

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.spans)

    @property
    def num_action_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.spans if s.kind is SpanKind.ACTION)

    def counts(self) -> EpisodeCounts:
        """The numbers of its turns and calls."""
        calls = [call for turn in self.turns for call in turn.calls]
        return EpisodeCounts(
            turns=sum(s.kind is SpanKind.ACTION for s in self.spans),
            calls=len(calls),
            call_errors=sum(not call.ok for call in calls),
            tool_seconds=sum(call.seconds for call in calls),
            observation_tokens=sum(len(s.token_ids) for s in self.spans if s.kind is SpanKind.OBSERVATION),
            void=any(turn.void for turn in self.turns),
        )

    def token_ids(self) -> npt.NDArray[np.int32]:
        """All tokens, int32 [num_tokens]."""
        return np.concatenate([s.token_ids for s in self.spans])

    def version_runs(self) -> VersionRuns:
        """Of its action tokens, also across observations; where a span does not tell, the oldest version."""
        actions = [s for s in self.spans if s.kind is SpanKind.ACTION]
        return merged_runs(run for s in actions for run in s.versions or ((self.weight_versions[0], len(s.token_ids)),))

    def versions(self) -> npt.NDArray[np.int64]:
        """The policy version that drew each action token, -1 elsewhere; int64 [num_tokens]."""
        drawn = np.full(self.num_tokens, -1, np.int64)
        runs = self.version_runs()
        drawn[self.action_mask()] = np.repeat([v for v, _ in runs], [n for _, n in runs]) if runs else []
        return drawn

    def action_mask(self) -> npt.NDArray[np.bool_]:
        """True where the policy wrote the token, bool [num_tokens]."""
        return np.concatenate([np.full(len(s.token_ids), s.kind is SpanKind.ACTION) for s in self.spans])

    def rollout_logprobs(self) -> npt.NDArray[np.float32]:
        """The engine's log-prob of each action token, 0 elsewhere; float32 [num_tokens]."""
        return np.concatenate(
            [s.logprobs if s.kind is SpanKind.ACTION else np.zeros(len(s.token_ids), np.float32) for s in self.spans]
        )
