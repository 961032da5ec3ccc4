"""The objects that flow through a step.

    Prompt -> Trajectory(Span...) -> Group -> TokenBatch -> Scores -> Control -> UpdateStats

Each stage is a new frozen type; none has a field that is filled in later. Tensors are named by shape: `_T` tokens,
`_N` sequences.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stare_megatron.dynamics import Dynamics

if TYPE_CHECKING:
    import torch


class SpanKind(enum.Enum):
    """Who wrote a span: the data set, the policy, or the environment (tool output)."""

    PROMPT = "prompt"
    ACTION = "action"
    OBSERVATION = "observation"


class Status(enum.Enum):
    """How a trajectory ended."""

    COMPLETED = "completed"  # the policy stopped by itself
    TRUNCATED = "truncated"  # the token or turn budget ended it
    FAILED = "failed"  # the environment or the engine failed it; carries no loss


@dataclass(frozen=True)
class Prompt:
    """One row of a data set, tokenised.

    Example:
        Prompt(id="sum-00017", source="order_free_sum", text="3 9 4 1 :", token_ids=(1, 15, 21, 16, 13, 5), answer="17")
    """

    id: str
    source: str
    text: str
    token_ids: tuple[int, ...]
    answer: str

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
    policy version of the first token.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    status: Status
    weight_version: int


@dataclass(frozen=True, eq=False)
class Span:
    """A run of tokens of one kind, exactly as the engine saw them.

    `token_ids` int32 [n]. `logprobs` float32 [n], natural log, under the sampling policy at temperature 1 before
    top-p (vLLM's raw log-probs); empty unless `kind` is ACTION.

    Example:
        Span(SpanKind.ACTION, np.array([7, 9, 2], np.int32), np.array([-0.1, -1.2, -0.01], np.float32))
    """

    kind: SpanKind
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

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


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One sampled token stream: a prompt span, then action and observation spans in the order they happened.

    `weight_version`: the policy version that sampled the first action token. `seed`: the sampling seed.

    Example:
        Trajectory("sum-00017", 0, (prompt_span, action_span), Status.COMPLETED, weight_version=3, seed=71)
    """

    prompt_id: str
    sample: int
    spans: tuple[Span, ...]
    status: Status
    weight_version: int
    seed: int

    def __post_init__(self) -> None:
        if not self.spans or self.spans[0].kind is not SpanKind.PROMPT:
            raise ValueError(f"trajectory {self.prompt_id}/{self.sample} must begin with its prompt span")

    @property
    def num_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.spans)

    @property
    def num_action_tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.spans if s.kind is SpanKind.ACTION)

    def token_ids(self) -> npt.NDArray[np.int32]:
        """All tokens, int32 [num_tokens]."""
        return np.concatenate([s.token_ids for s in self.spans])

    def action_mask(self) -> npt.NDArray[np.bool_]:
        """True where the policy wrote the token, bool [num_tokens]."""
        return np.concatenate([np.full(len(s.token_ids), s.kind is SpanKind.ACTION) for s in self.spans])

    def rollout_logprobs(self) -> npt.NDArray[np.float32]:
        """The engine's log-prob of each action token, 0 elsewhere; float32 [num_tokens]."""
        return np.concatenate(
            [s.logprobs if s.kind is SpanKind.ACTION else np.zeros(len(s.token_ids), np.float32) for s in self.spans]
        )


@dataclass(frozen=True)
class Score:
    """What a reward function says of a trajectory. `reward` is what is trained on; `correct` is what is reported.

    Example:
        Score(reward=1.0, correct=True, note="")
    """

    reward: float
    correct: bool
    note: str

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

    def summary(self) -> GroupSummary:
        return GroupSummary(
            prompt_id=self.prompt.id,
            source=self.prompt.source,
            rewards=tuple(s.reward for s in self.scores),
            correct=tuple(s.correct for s in self.scores),
            num_tokens=tuple(t.num_tokens for t in self.trajectories),
            num_action_tokens=tuple(t.num_action_tokens for t in self.trajectories),
            statuses=tuple(t.status for t in self.trajectories),
            weight_versions=tuple(t.weight_version for t in self.trajectories),
        )


@dataclass(frozen=True)
class GroupSummary:
    """What the driver may know of a group: numbers, no tokens. Tuples are indexed by sample.

    Example:
        GroupSummary("sum-00017", "order_free_sum", (1.0, 0.0), (True, False), (22, 20), (16, 14), (...), (3, 3))
    """

    prompt_id: str
    source: str
    rewards: tuple[float, ...]
    correct: tuple[bool, ...]
    num_tokens: tuple[int, ...]
    num_action_tokens: tuple[int, ...]
    statuses: tuple[Status, ...]
    weight_versions: tuple[int, ...]

    @property
    def zero_variance(self) -> bool:
        """All rewards equal: the group-relative advantage is 0 and the group teaches nothing.

        FAILED samples say nothing about the policy and do not count; fewer than two others teach nothing either.
        """
        rewards = [r for r, status in zip(self.rewards, self.statuses, strict=True) if status is not Status.FAILED]
        return len(rewards) < 2 or min(rewards) == max(rewards)


@dataclass(frozen=True)
class GroupRequest:
    """An order for one group: sample `group_size` trajectories of `prompt`.

    `order`: position in the generation batch, by which results are sorted, so that the batch does not depend on which
    engine was faster. Sample i draws with a seed derived from (`seed`, i).
    """

    order: int
    prompt: Prompt
    group_size: int
    seed: int


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
class UpdateShare:
    """One data-parallel rank's part of one optimizer step, as the driver orders it.

    `assignments` name groups by their index in the list of groups handed over with it. `num_action_tokens` and
    `num_sequences` count the whole step over all ranks. `num_micro_batches` is the same on every rank.

    Example:
        UpdateShare(assignments=(Assignment(0, (0, 1), (0, 22)),), num_action_tokens=30, num_sequences=2,
                    num_micro_batches=1)
    """

    assignments: tuple[Assignment, ...]
    num_action_tokens: int
    num_sequences: int
    num_micro_batches: int


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The sequences one data-parallel rank trains on in an update, flat and unpadded.

    `token_ids_T` int64; `action_T` bool: the policy wrote this token, so it carries loss, surprisal and entropy;
    `rollout_logprob_T` float32, 0 where `action_T` is False; `advantage_T` float32, 0 where `action_T` is False;
    `global_id_T` int64: the token's index in the update batch; `sequence_T` int64: index into `_N`;
    `cu_seqlens_N1` int32 [N + 1]: sequence n is tokens cu[n]:cu[n + 1]; `global_sequence_N` int64.
    `num_action_tokens` and `num_sequences` count the whole update batch over all ranks (the global denominators).

    Example (two sequences of 3 and 2 tokens, one prompt token each):
        TokenBatch(token_ids_T=[5, 8, 2, 6, 2], action_T=[F, T, T, F, T], ..., cu_seqlens_N1=[0, 3, 5], ...)
    """

    token_ids_T: torch.Tensor
    action_T: torch.Tensor
    rollout_logprob_T: torch.Tensor
    advantage_T: torch.Tensor
    global_id_T: torch.Tensor
    sequence_T: torch.Tensor
    cu_seqlens_N1: torch.Tensor
    global_sequence_N: torch.Tensor
    num_action_tokens: int
    num_sequences: int

    def __post_init__(self) -> None:
        tokens = self.token_ids_T.shape[0]
        for name in ("action_T", "rollout_logprob_T", "advantage_T", "global_id_T", "sequence_T"):
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


@dataclass(frozen=True)
class ScoreSummary:
    """Sums of `Scores` over the whole update batch, equal on every rank and for every layout.

    `entropy`: mean over action tokens, nats. `surprisal`: mean of -logprob, nats. `mismatch_mean`, `mismatch_max`:
    |trainer log-prob - engine log-prob| over action tokens, nats. `mismatch_kl`: mean of r - 1 - log r with
    r = exp(trainer - engine), an estimate of KL(engine || trainer), nats. `mismatch_ratio_max`: largest r.
    `mismatch_ess`: effective sample size under the weights r, as a share of the tokens: (sum r)^2 / (n sum r^2).
    """

    num_action_tokens: int
    entropy: float
    surprisal: float
    mismatch_mean: float
    mismatch_max: float
    mismatch_kl: float
    mismatch_ratio_max: float
    mismatch_ess: float


@dataclass(frozen=True)
class Control:
    """The gate's decision for one step. Weights are 1 everywhere when `gate_on` is False.

    `weight_pos` (W) multiplies the loss of L+, `weight_neg` (M) that of L- (variant C2); `entropy` is what was
    observed, `target` what is wanted at this step, nats. `entropy_coefficient`: factor of an entropy bonus, loss a nat.

    Example:
        Control(gate_on=True, weight_pos=1.1, weight_neg=0.9, entropy=0.21, target=0.3)
    """

    gate_on: bool
    weight_pos: float
    weight_neg: float
    entropy: float
    target: float
    entropy_coefficient: float = 0.0


@dataclass(frozen=True)
class UpdateStats:
    """One optimizer step, equal on every rank.

    `loss`: the objective; `grad_norm`: before clipping; `learning_rate`; `clip_fraction`: share of action tokens whose
    ratio was clipped; `ratio_max`; `kl`: mean of r - 1 - log r against the scoring policy, nats;
    `selected_pos`, `selected_neg`: tokens in L+ and L-; `num_pos`, `num_neg`: tokens in T+ and T-.
    `correction_mean`: mean rollout-correction factor; `correction_bounded`: share of tokens truncated or masked by it.
    `dynamics`: what the step is expected to do to the entropy.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    clip_fraction: float
    ratio_max: float
    kl: float
    selected_pos: int
    selected_neg: int
    num_pos: int
    num_neg: int
    correction_mean: float
    correction_bounded: float
    dynamics: Dynamics
