"""The reference policy of a rank: a second set of values for the parameters of the one model it has.

For the reference pass the values change places with the policy's, bundle by bundle, and change back: no second model,
no second set of activations, and one copy of the parameters in memory, which is the reference's while the policy is in
the model and the policy's while the reference is. Bytes are moved, so that both come back bit for bit; gradients,
master weights and moments are not touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel

from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.algorithm import Algorithm
from stare_megatron.algo.comm import Comm
from stare_megatron.algo.kl import estimate, penalized
from stare_megatron.algo.reduce import FIXED_POINT_BITS, from_fixed_point
from stare_megatron.config import AlgorithmConfig
from stare_megatron.config.kl import KlConfig
from stare_megatron.errors import RunError
from stare_megatron.host import copies
from stare_megatron.trainer import bridge
from stare_megatron.trainer.loading import Sampled
from stare_megatron.trainer.model import refuse_overflow
from stare_megatron.trainer.model_runner import RankBatch, Runner
from stare_megatron.trainer.offload import Offload
from stare_megatron.trainer.scoring import score
from stare_megatron.types import Group, Measured, UpdateShare

_BUNDLE = 64 << 20  # bytes that are on the device a second time while they change places
_MAX_TERM = 2.0**15  # nats: bound of a token's term of a response's sum, so that fixed point cannot overflow


class Values:
    """Values for the storages of some tensors, beside those that they hold.

    Args:
        storages: what the tensors are views of, each once; may be away (of size 0) at any time but during `exchanged`.
        place: where the others are kept: the tensors' own device, or the host.

    Raises:
        RunError: the host has no memory for them.
    """

    def __init__(self, storages: Sequence[torch.UntypedStorage], place: torch.device, *, on_device: bool) -> None:
        self._storages = list(storages)
        self._sizes = [storage.nbytes() for storage in storages]
        total = sum(self._sizes)
        self._kept_B = (
            torch.empty(total, dtype=torch.uint8, device=place)
            if on_device
            else copies.host_block(total, "algorithm.kl.residency", "set it to 'device'")
        )
        self._stream = copies.copy_stream()

    @property
    def bytes(self) -> int:
        return self._kept_B.numel()

    def keep(self) -> None:
        """Keep what the tensors hold now."""
        start = 0
        for storage, size in zip(self._storages, self._sizes, strict=True):
            self._kept_B[start : start + size].copy_(_bytes(storage))
            start += size
        copies.finish()

    def exchange(self) -> None:
        """What the tensors hold and what is kept change places."""
        with copies.on_stream(self._stream):
            start = 0
            for storage, size in zip(self._storages, self._sizes, strict=True):
                here_B = _bytes(storage)
                for first in range(0, size, _BUNDLE):
                    mine_B = here_B[first : first + _BUNDLE]
                    kept_B = self._kept_B[start + first : start + first + mine_B.numel()]
                    other_B = kept_B.to(mine_B.device, non_blocking=True, copy=True)
                    kept_B.copy_(mine_B, non_blocking=True)
                    mine_B.copy_(other_B)
                start += size
        copies.wait_for(self._stream)

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Within it the tensors hold the kept values; afterwards, also after an error, their own."""
        self.exchange()
        try:
            yield
        finally:
            copies.finish()  # nothing reads them any more
            self.exchange()


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [size], a view."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, eq=False)
class ReferencedBatch(RankBatch):
    """One optimizer step's data on a rank with the reference's log-probs, at the rollout temperature, float32 [T]: 0
    where the token is not this rank's, and on all but the last pipeline stage."""

    reference_logprob_T: torch.Tensor


class Reference:
    """The reference policy of this rank. Made while its parameters are on the device and hold what the run begins with.

    Raises:
        RunError: there is no memory for it. UserError: a checkpoint of another model, or values beyond float16.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        storages: Sequence[torch.UntypedStorage],
        place: torch.device,
        kl: KlConfig,
    ) -> None:
        self._kl = kl
        self._values = Values(storages, place, on_device=kl.residency == "device")
        self._values.keep()
        self._seconds = 0.0
        if kl.reference:
            folder = Path(kl.reference)
            # What is kept is the policy while the reference is read into the model.
            bridge.load_weights(chunks, folder)
            if next(chunks[0].parameters()).dtype is torch.float16:
                refuse_overflow([chunk.module for chunk in chunks], folder)
            self._values.exchange()

    @property
    def device_bytes(self) -> int:
        """What is always on the rank's device of it."""
        return self._values.bytes if self._kl.residency == "device" else 0

    def logprobs(self, runner: Runner, data: Sequence[RankBatch], temperature: float) -> list[ReferencedBatch]:
        """A pass of the reference over the optimizer steps. Parameters must be present. A collective."""
        began = time.perf_counter()
        own = dataclasses.replace(runner, replay=None)  # the engines' experts are the policy's
        with self._values.exchanged():
            found = [score(own, step, temperature).scores.logprob_T for step in data]
        self._seconds += time.perf_counter() - began
        return [
            ReferencedBatch(**vars(step), reference_logprob_T=logprob_T)
            for step, logprob_T in zip(data, found, strict=True)
        ]

    def refer(
        self,
        data: Sequence[RankBatch],
        sampled: Sampled,
        logprobs: Sequence[torch.Tensor],
        runner: Runner,
        temperature: float,
        algorithm: Algorithm,
        config: AlgorithmConfig,
    ) -> list[RankBatch]:
        """The optimizer steps with the reference's log-probs and, where the reward is the term's place, the advantages
        that follow from it. A collective.

        `sampled`: what they were made of; `logprobs`: of the policy, float32 [T] of each, from the pass before.

        Raises:
            RunError: a log-prob of the reference is not finite; on every rank.
        """
        referenced = self.logprobs(runner, data, temperature)
        if config.kl.place == "loss":
            return [*referenced]
        steps = zip(referenced, sampled, logprobs, strict=True)
        return [penalize(runner, step, made_of, old_T, algorithm, config) for step, made_of, old_T in steps]

    def measured(self) -> tuple[Measured, ...]:
        """Size of the kept copy, MB; seconds of reference passes since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return Measured("memory/trainer_reference", self._values.bytes / 2**20), Measured("time/reference", seconds)


def build_reference(
    chunks: Sequence[DistributedDataParallel], offload: Offload, place: torch.device, kl: KlConfig
) -> Reference | None:
    """None where the coefficient is 0. Errors as `Reference`."""
    if not kl.on:
        return None
    made = Reference(chunks, offload.storages("parameters"), place, kl)
    offload.stays(made.device_bytes)
    return made


def penalize(
    runner: Runner,
    data: ReferencedBatch,
    sampled: tuple[list[Group], UpdateShare],
    old_logprob_T: torch.Tensor,
    algorithm: Algorithm,
    config: AlgorithmConfig,
) -> ReferencedBatch:
    """`data` with the advantages of rewards from which the KL of each response is taken: `sampled` is what the batch
    was made of. A collective of the last pipeline stage, which alone needs them: the others keep theirs.

    Raises:
        RunError: a log-prob of the reference is not finite; on every rank.
    """
    if not runner.is_last_stage:
        return data
    batch = data.batch
    term_T = estimate(old_logprob_T, data.reference_logprob_T, config.kl.estimator).double()
    term_T = torch.where(data.owned_T, term_T, 0.0)
    broken = runner.comm.sum((~term_T.isfinite()).sum()[None])
    if int(broken):
        raise RunError(f"reference pass: {int(broken)} action tokens have a non-finite log-prob")
    fixed_T = (term_T.clamp(-_MAX_TERM, _MAX_TERM) * (1 << FIXED_POINT_BITS)).round().to(torch.int64)
    sum_N = torch.zeros(batch.global_sequence_N.shape[0], dtype=torch.int64, device=fixed_T.device)
    sum_N.index_add_(0, batch.sequence_T, fixed_T)
    sums = _of_all_ranks(batch.global_sequence_N.to(sum_N.device), sum_N, runner.comm)
    groups, share = sampled
    values = _advantages(groups, share, sums, algorithm, config)
    value_N = torch.tensor(values, dtype=torch.float32, device=fixed_T.device)
    advantage_T = torch.where(batch.action_T, value_N[batch.sequence_T], 0.0)
    return dataclasses.replace(data, batch=dataclasses.replace(batch, advantage_T=advantage_T))


def _of_all_ranks(key_N: torch.Tensor, sum_N: torch.Tensor, comm: Comm) -> dict[int, int]:
    """Sums in fixed point by the global token id that a sequence begins at; ranks that share one add up."""
    count = int(comm.max(torch.tensor([key_N.shape[0]], device=sum_N.device)))
    row_2N = torch.full((2, count), -1, dtype=torch.int64, device=sum_N.device)
    row_2N[0, : key_N.shape[0]], row_2N[1, : key_N.shape[0]] = key_N, sum_N
    sums: dict[int, int] = {}
    for rows in comm.gather(row_2N):
        for key, total in rows.t().tolist():
            if key >= 0:
                sums[key] = sums.get(key, 0) + total
    return sums


def _advantages(
    groups: Sequence[Group],
    share: UpdateShare,
    sums: dict[int, int],
    algorithm: Algorithm,
    config: AlgorithmConfig,
) -> list[float]:
    """Of the share's sequences, in its order."""
    values: list[float] = []
    for assignment in share.assignments:
        group = groups[assignment.group]
        counted = [i for i, trajectory in enumerate(group.trajectories) if trajectory.status.is_trainable]
        outcomes = [Outcome(group.scores[i].reward, group.trajectories[i].num_action_tokens) for i in counted]
        keys = _keys(group, assignment.samples[0], assignment.first_token[0])
        totals = [from_fixed_point(sums[keys[i]]) if i in keys else 0.0 for i in counted]
        found = algorithm.advantage(penalized(outcomes, totals, config.kl.coefficient), config)
        of_sample = dict(zip(counted, found, strict=True))
        values += [of_sample[sample] for sample in assignment.samples]
    return values


def _keys(group: Group, sample: int, first_token: int) -> dict[int, int]:
    """The global token id that each sample begins at, from that of one: those with loss follow one another
    (`data.packing.plan_updates`)."""
    starts: dict[int, int] = {}
    end = 0
    for i, trajectory in enumerate(group.trajectories):
        if trajectory.status.is_trainable and trajectory.num_action_tokens:
            starts[i] = end
            end += trajectory.num_tokens
    return {i: start + first_token - starts[sample] for i, start in starts.items()}
