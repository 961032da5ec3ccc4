"""The objects of an update batch: what was sampled, who trains on it, and what was found of its tokens.

Tensors are named by shape: `_T` tokens, `_N` sequences. What makes up a trajectory is in `trajectory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stare_megatron.types.measured import Measured
from stare_megatron.types.trajectory import (
    Completion,
    EpisodeCounts,
    Prompt,
    Sampling,
    Status,
    Trajectory,
    VersionRuns,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Score:
    """What a reward function says of a trajectory. `reward` is what is trained on; `correct` is what is reported.

    `graded` is False when nothing could be said: the engine or the environment failed, or the grading itself did.
    `measured`: what else to report of the trajectory.

    Example:
        Score(reward=1.0, correct=True, note="")
    """

    reward: float
    correct: bool
    note: str
    graded: bool = True
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        if not np.isfinite(self.reward):
            raise ValueError(f"reward must be finite, got {self.reward}")


@dataclass(frozen=True, eq=False)
class Group:
    """All samples of one prompt with their scores: the unit of the group-relative advantage.

    Example:
        Group(prompt, trajectories=(t0, t1), scores=(Score(1.0, True, ""), Score(0.0, False, "")))
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if not self.trajectories or len(self.trajectories) != len(self.scores):
            raise ValueError(
                f"group {self.prompt.id}: {len(self.trajectories)} trajectories and {len(self.scores)} scores"
            )

    def summary(self, reflections: tuple[int, ...] = ()) -> GroupSummary:
        """The group's numbers. `reflections`: reflection words in each response; empty: not counted, 0 each."""
        pairs = zip(self.trajectories, self.scores, strict=True)
        return GroupSummary(
            prompt_id=self.prompt.id,
            source=self.prompt.source,
            rewards=tuple(s.reward for s in self.scores),
            correct=tuple(s.correct for s in self.scores),
            num_tokens=tuple(t.num_tokens for t in self.trajectories),
            num_action_tokens=tuple(t.num_action_tokens for t in self.trajectories),
            statuses=tuple(t.status for t in self.trajectories),
            weight_versions=tuple(t.weight_versions[0] for t in self.trajectories),
            graded=tuple(s.graded for s in self.scores),
            reflections=reflections or (0,) * len(self.trajectories),
            distinct_correct=len({t.token_ids().tobytes() for t, s in pairs if s.correct}),
            episodes=tuple(t.counts() for t in self.trajectories),
            measured=tuple(part for s in self.scores for part in s.measured),
            versions=tuple(t.version_runs() for t in self.trajectories),
        )


@dataclass(frozen=True)
class GroupSummary:
    """What the driver may know of a group: numbers, no tokens. Tuples are indexed by sample.

    `reflections`: reflection words in each response; `distinct_correct`: distinct token streams among the correct;
    `episodes`: turns and tool calls; empty: not counted. `measured`: what else the reward reported. `weight_versions`:
    the oldest policy that drew a token; `versions`: those of all action tokens; empty: the oldest.

    Example:
        GroupSummary("sum-00017", "order_free_sum", (1.0, 0.0), (True, False), (22, 20), (16, 14), (...), (3, 3),
                     graded=(True, True), reflections=(0, 2), distinct_correct=1)
    """

    prompt_id: str
    source: str
    rewards: tuple[float, ...]
    correct: tuple[bool, ...]
    num_tokens: tuple[int, ...]
    num_action_tokens: tuple[int, ...]
    statuses: tuple[Status, ...]
    weight_versions: tuple[int, ...]
    graded: tuple[bool, ...]
    reflections: tuple[int, ...]
    distinct_correct: int
    episodes: tuple[EpisodeCounts, ...] = ()
    measured: tuple[Measured, ...] = ()
    versions: tuple[VersionRuns, ...] = ()

    def version_runs(self) -> tuple[VersionRuns, ...]:
        """Which policies drew the action tokens of each sample."""
        return self.versions or tuple(
            ((version, tokens),) for version, tokens in zip(self.weight_versions, self.num_action_tokens, strict=True)
        )

    @property
    def zero_variance(self) -> bool:
        """All rewards equal: the group-relative advantage is 0 and the group teaches nothing.

        Samples that are not learned from (see `Status.is_trainable`) are left out; fewer than two others teach nothing.
        """
        rewards = [r for r, status in zip(self.rewards, self.statuses, strict=True) if status.is_trainable]
        return len(rewards) < 2 or min(rewards) == max(rewards)


@dataclass(frozen=True, eq=False)
class Graded:
    """A sample of a group that is finished while others of it are not."""

    sample: int
    trajectory: Trajectory
    score: Score


@dataclass(frozen=True, eq=False)
class Partial:
    """What is `drawn` of the first turn of a sample that is not finished, after `prompt_ids` int32 [n]. `ended`: the
    turn is over; else the status of `drawn` says nothing."""

    sample: int
    prompt_ids: npt.NDArray[np.int32]
    drawn: Completion
    ended: bool


@dataclass(frozen=True)
class Begun:
    """What there is of a group that is not finished; of samples that are in neither there is nothing."""

    graded: tuple[Graded, ...] = ()
    partial: tuple[Partial, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.graded or self.partial)

    def __add__(self, other: Begun) -> Begun:
        return Begun((*self.graded, *other.graded), (*self.partial, *other.partial))


@dataclass(frozen=True)
class GroupRequest:
    """An order for one group: sample `group_size` trajectories of `prompt`.

    `order`: position in the generation batch, by which results are sorted, so that the batch does not depend on which
    engine was faster. Sample i draws with a seed derived from (`sampling.seed`, i). `begun`: what there is already of
    its samples, which are gone on with.
    """

    order: int
    prompt: Prompt
    group_size: int
    sampling: Sampling
    begun: Begun = Begun()


@dataclass(frozen=True)
class Assignment:
    """Which samples of which group one data-parallel rank trains on, and their place in the update batch.

    `first_token`: global index of each sample's first token in the update batch (the batch order is the driver's, so
    it is the same for every layout); global token ids break ties in the selection.

    Example:
        Assignment(group=4, samples=(0, 3), first_token=(1024, 1150))
    """

    group: int
    samples: tuple[int, ...]
    first_token: tuple[int, ...]


@dataclass(frozen=True)
class SequenceCost:
    """What a sequence of s tokens costs a forward pass, in floating-point operations: `linear` s + `quadratic` s^2.

    Example:
        SequenceCost(linear=6.4e10, quadratic=1.05e6)(32768)  # Qwen3-32B: 3.2e15
    """

    linear: float
    quadratic: float

    def __call__(self, tokens: int) -> float:
        return self.linear * tokens + self.quadratic * tokens * tokens


@dataclass(frozen=True)
class UpdateShare:
    """One data-parallel rank's part of one optimizer step, as the driver orders it.

    `assignments` name groups by their index in the list of groups handed over with it. `num_action_tokens` and
    `num_sequences` count the whole step over all ranks. `micro_batches`: indices of the sequences of each, counted
    through the assignments; as many on every rank, some may be empty. `cost_imbalance`: of the whole step, see
    `data.packing.cost_imbalance`. `largest_tokens`: of the largest micro-batch of any rank.

    Example:
        UpdateShare(assignments=(Assignment(0, (0, 1), (0, 22)),), num_action_tokens=30, num_sequences=2,
                    micro_batches=((0, 1),), cost_imbalance=0.0, largest_tokens=40)
    """

    assignments: tuple[Assignment, ...]
    num_action_tokens: int
    num_sequences: int
    micro_batches: tuple[tuple[int, ...], ...]
    cost_imbalance: float
    largest_tokens: int


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The sequences one data-parallel rank trains on in an update, flat and unpadded.

    `token_ids_T` int64; `action_T` bool: the policy wrote this token, so it carries loss, surprisal and entropy;
    `rollout_logprob_T` float32, 0 where `action_T` is False; `version_T` int64: the policy version that drew the token,
    -1 where `action_T` is False; `advantage_T` float32, 0 where `action_T` is False;
    `global_id_T` int64: the token's index in the update batch; `sequence_T` int64: index into `_N`;
    `cu_seqlens_N1` int32 [N + 1]: sequence n is tokens cu[n]:cu[n + 1]; `global_sequence_N` int64.
    `num_action_tokens` and `num_sequences` count the whole update batch over all ranks (the global denominators).

    Example (two sequences of 3 and 2 tokens, one prompt token each):
        TokenBatch(token_ids_T=[5, 8, 2, 6, 2], action_T=[F, T, T, F, T], ..., cu_seqlens_N1=[0, 3, 5], ...)
    """

    token_ids_T: torch.Tensor
    action_T: torch.Tensor
    rollout_logprob_T: torch.Tensor
    version_T: torch.Tensor
    advantage_T: torch.Tensor
    global_id_T: torch.Tensor
    sequence_T: torch.Tensor
    cu_seqlens_N1: torch.Tensor
    global_sequence_N: torch.Tensor
    num_action_tokens: int
    num_sequences: int

    def __post_init__(self) -> None:
        tokens = self.token_ids_T.shape[0]
        for name in ("action_T", "rollout_logprob_T", "version_T", "advantage_T", "global_id_T", "sequence_T"):
            if self.__dict__[name].shape != (tokens,):
                raise ValueError(f"TokenBatch.{name}: shape {tuple(self.__dict__[name].shape)}, want ({tokens},)")
        if int(self.cu_seqlens_N1[-1]) != tokens:
            raise ValueError(f"TokenBatch.cu_seqlens_N1 ends at {int(self.cu_seqlens_N1[-1])}, want {tokens}")
        if self.global_sequence_N.shape[0] != self.cu_seqlens_N1.shape[0] - 1:
            raise ValueError("TokenBatch.global_sequence_N and cu_seqlens_N1 disagree on the number of sequences")


@dataclass(frozen=True, eq=False)
class Scores:
    """The policy about to be updated, on a `TokenBatch`. The value at token t is that of predicting token t.

    `logprob_T` float32, natural log, at the rollout temperature; `entropy_T` float32, nats; `sensitivity_T` float32,
    nats: S of the token, such that a policy-gradient step of size eta on its logits changes the entropy of its
    distribution by -eta A S. All 0 where the token is no action. Lives on the rank that made it; only the last pipeline
    stage has it.
    """

    logprob_T: torch.Tensor
    entropy_T: torch.Tensor
    sensitivity_T: torch.Tensor
