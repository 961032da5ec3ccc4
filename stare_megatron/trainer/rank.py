"""One trainer rank: everything the driver may ask of it. No ray; the same object runs under torchrun.

All ranks make the same calls in the same order: most are collectives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.utils import get_model_config

from stare_megatron.algo.comm import comm
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.algo.stare import Candidates, Weights
from stare_megatron.config import Config
from stare_megatron.config.float8 import BLOCKS
from stare_megatron.errors import RunError
from stare_megatron.host import device, manifest
from stare_megatron.models.boxes import Box
from stare_megatron.models.layout import padded_vocab
from stare_megatron.trainer import checkpoint, parallel
from stare_megatron.trainer.ages import ages, measure
from stare_megatron.trainer.bridge import export, holdings, metadata
from stare_megatron.trainer.export import export_hf
from stare_megatron.trainer.head import Head
from stare_megatron.trainer.loading import Sampled, rank_batches
from stare_megatron.trainer.model import build_model
from stare_megatron.trainer.model_runner import RankBatch, Runner
from stare_megatron.trainer.offload import Offload
from stare_megatron.trainer.optimizer import build_optimizer, report, step, zero_grad
from stare_megatron.trainer.partials import vocab_shard
from stare_megatron.trainer.reference import build_reference
from stare_megatron.trainer.replay import build_replay
from stare_megatron.trainer.schedule import learning_rate
from stare_megatron.trainer.scoring import (
    SampledBatch,
    Scored,
    ScoredBatch,
    read_rollout,
    score,
    score_tokens,
    summarize,
)
from stare_megatron.trainer.sequence import SequenceLayout
from stare_megatron.trainer.step import (
    ForwardBackwardResult,
    entropy_dynamics,
    entropy_reading,
    exact_sets,
    forward_backward,
    token_records,
    weigh,
)
from stare_megatron.trainer.streaming import streamed
from stare_megatron.trainer.writing import Writing
from stare_megatron.types import (
    Control,
    EntropyReading,
    Measured,
    ScoreSummary,
    StepStats,
    UpdateStats,
)
from stare_megatron.types.token_record import TokenRecord

COLLECTIVE_TIMEOUT_S = 1800.0  # ranks enter a collective together; the slowest may be a long micro-batch behind
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TrainerRank:
    """The policy's shard, its optimizer, and the update batch in hand.

    Order within a step: `load`, `score`, `update`. A collective: construction waits for all ranks.

    Raises:
        UserError: an unsupported checkpoint, an impossible layout, or nobody answers at the rendezvous.
    """

    def __init__(
        self, config: Config, *, rank: int, world_size: int, local_rank: int, master_addr: str, master_port: int
    ) -> None:
        self._config = config
        self._algorithm = ALGORITHMS[config.algorithm.method]
        self._dtype = DTYPES[config.model.dtype]
        place = device.torch_device(local_rank)
        parallel.initialize(
            config.trainer,
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            master_addr=master_addr,
            master_port=master_port,
            seed=config.run.seed,
            timeout_s=COLLECTIVE_TIMEOUT_S,
        )

        trainer = config.trainer
        begin = Path(config.model.weights) if config.model.weights else None
        self._chunks = build_model(config.model.path, self._dtype, trainer, place, config.window, begin)
        self._optimizer = build_optimizer(self._chunks, trainer)
        if "optimizer" in trainer.offload:
            checkpoint.make_moments(self._optimizer)  # so that it is known how much there is to move
        self._offload = Offload(self._chunks, self._optimizer, trainer.offload, place, trainer.offload_residue_mb << 20)
        self._reference = build_reference(self._chunks, self._offload, place, config.algorithm.kl)
        self._offload.put_away("gradients", "optimizer", "parameters")
        self._offload.give_back()
        self._shape = get_model_config(self._chunks[0]).shape
        columns = padded_vocab(self._shape.vocab, trainer.tensor_parallel) // trainer.tensor_parallel
        vocab = vocab_shard(self._shape.vocab, columns, parallel.tp_group())
        self._runner = Runner(
            chunks=self._chunks,
            head=Head(self._chunks[-1].module, vocab, trainer.logits_chunk_tokens),  # pyright: ignore[reportArgumentType]
            comm=comm(parallel.dp_cp_group()),
            context_comm=comm(parallel.cp_group()),
            pipeline=parallel.pp_group(),
            last_stage=parallel.last_stage_rank(),
            is_last_stage=parallel.is_last_stage(),
            place=place,
            replay=build_replay(self._chunks, trainer) if config.inference.routing_replay else None,
        )
        self._layout = SequenceLayout(
            sequence_parallel=trainer.tensor_parallel if trainer.sequence_parallel else 1,
            context_parallel=trainer.context_parallel,
            context_rank=parallel.context_parallel_rank(),
            block=BLOCKS.get(trainer.fp8, 1),
        )
        self._optimizer_steps = 0
        self._step = 0
        self._whole = True
        self._loaded: list[RankBatch] = []
        self._sampled: Sampled = ()  # the loaded batch's origin, where there is a reference
        self._known: ScoredBatch | SampledBatch | None = None
        self._trained: list[tuple[RankBatch, ForwardBackwardResult]] = []
        self._writer = checkpoint.writer(trainer)
        self._writing: Writing | None = None
        self._saved = 0, 0.0

    def position(self) -> parallel.Position:
        return parallel.position()

    def load(self, groups_per_update: Sampled) -> None:
        """Take this rank's share of an update batch: for each optimizer step the groups its share names, by index.

        Raises:
            RunError: with `inference.routing_replay`, a trajectory without its experts.
        """
        self._known, self._trained = None, []
        how = (self._runner, self._layout, self._shape, self._algorithm, self._config.algorithm)
        self._loaded = rank_batches(groups_per_update, *how)
        self._sampled = groups_per_update if self._reference else ()
        self._ages = ages(self._loaded, self._step, self._config.sampling.oldest)

    def score(self) -> EntropyReading:
        """The mean entropy of the loaded batch under the present weights, equal on every rank: measured by a forward
        pass, whose log-probs and entropies stay here, or with `trainer.scoring = "rollout"` estimated without one.

        Raises:
            RunError: a log-prob or entropy is not finite.
        """
        if not self._loaded:
            raise RuntimeError("load() comes before score()")
        if self._config.trainer.scoring == "rollout":
            (data,) = self._loaded = self._refer([d.batch.rollout_logprob_T for d in self._loaded])
            self._known = SampledBatch(data)
            return read_rollout(self._runner, self._known)
        temperature = self._config.rollout.temperature
        with self._offload.present("parameters"):
            scored = [score(self._runner, data, temperature) for data in self._loaded]
        summary = summarize(self._runner, self._loaded, scored, found_by="scoring pass")
        self._loaded = self._refer([s.scores.logprob_T for s in scored])
        self._known = ScoredBatch(self._loaded, scored, summary)
        return entropy_reading(self._runner, self._known, self._algorithm, self._config.algorithm, self._ages)

    def _refer(self, logprobs: Sequence[torch.Tensor]) -> list[RankBatch]:
        """The loaded batch with what the reference says of it; `logprobs`: the policy's, [T] of each optimizer step."""
        if self._reference is None:
            return self._loaded
        if self._writing is not None:
            self._writing.copied()
        how = (self._runner, self._config.rollout.temperature, self._algorithm, self._config.algorithm)
        with self._offload.present("parameters"):
            return self._reference.refer(self._loaded, self._sampled, logprobs, *how)

    def update(self, control: Control, *, keep_tokens: bool = False) -> StepStats:
        """Weigh the tokens of the scored batch and take its optimizer steps; the batch is dropped.

        `keep_tokens`: keep what is known of its tokens for `token_records`.

        Raises:
            RunError: a loss or gradient norm is not finite; the message names the optimizer step. After a non-finite
                norm the weights are spoilt: only a checkpoint helps. Without a scoring pass also: a log-prob or entropy
                is not finite; no weight was changed then.
        """
        known = self._known
        if known is None:
            raise RuntimeError("score() comes before update()")
        with self._offload.present("parameters", "gradients"):
            summary, updates, passes = self._learn(known, control)
        self._step, self._whole = self._step + 1, True
        if keep_tokens:
            self._trained = list(zip(self._loaded, passes, strict=True))
        self._loaded, self._known, self._sampled = [], None, ()
        self._offload.give_back()  # the engines are next
        return StepStats(summary, tuple(updates))

    def _learn(
        self, known: ScoredBatch | SampledBatch, control: Control
    ) -> tuple[ScoreSummary, list[UpdateStats], list[ForwardBackwardResult]]:
        config = self._config.algorithm
        if isinstance(known, SampledBatch):
            (weights,) = self._weigh([known.data], known.tokens(), control)
            seen = self._forward_backward(known.data, None, weights, control)
            summary = summarize(self._runner, [known.data], [seen.scored], found_by="update pass")
            (exact_T,) = exact_sets(self._runner, [known.data], [seen.scored], config)
            return summary, [self._optimizer_step(known.data, seen, exact_T)], [seen]
        updates, passes = [], []
        weighed = self._weigh(known.data, known.tokens(), control)
        exact = exact_sets(self._runner, known.data, known.scored, config)
        for data, scored, weights, exact_T in zip(known.data, known.scored, weighed, exact, strict=True):
            seen = self._forward_backward(data, scored, weights, control)
            updates.append(self._optimizer_step(data, seen, exact_T))
            passes.append(seen)
        selected = [seen.applied.selected_T for seen in passes]
        by_age = measure(self._runner, known.data, known.scored, selected, self._ages, config.correction)
        return ScoreSummary((*known.summary.measured, *by_age), known.summary.num_action_tokens), updates, passes

    def token_records(self, first_tokens: Collection[int]) -> dict[int, TokenRecord]:
        """Of the batch just updated on: what this rank knows of the tokens of the sequences that begin at these global
        token ids, by them; `token_record.join` makes one of the parts of context-parallel ranks. What `update` kept is
        dropped. No collective: empty but on the last pipeline stage's first tensor-parallel ranks, which have it.
        """
        trained, self._trained = self._trained, []
        position = self.position()
        if not position.is_last_stage or position.tensor_parallel_rank:
            return {}
        return token_records([data for data, _ in trained], [seen for _, seen in trained], first_tokens)

    def _weigh(self, data: Sequence[RankBatch], tokens: Candidates, control: Control) -> Sequence[Weights | None]:
        """Token weights of each optimizer step; None where each micro-batch is weighed by itself."""
        config = self._config.algorithm
        if config.stare.scope == "microbatch" and config.method == "stare":
            return [None] * len(data)
        return weigh(self._runner, data, tokens, control, self._algorithm, config, self._ages)

    def _forward_backward(
        self, data: RankBatch, scored: Scored | None, weights: Weights | None, control: Control
    ) -> ForwardBackwardResult:
        zero_grad(self._chunks, self._optimizer)
        config, temperature = self._config.algorithm, self._config.rollout.temperature
        return forward_backward(self._runner, data, scored, weights, control, self._algorithm, config, temperature)

    def _optimizer_step(self, data: RankBatch, seen: ForwardBackwardResult, exact_T: torch.Tensor) -> UpdateStats:
        expected = entropy_dynamics(self._runner, data, seen.scored, seen.applied, exact_T)
        return UpdateStats((*seen.measured, *expected, *self._apply(data, seen["update/loss"])))

    def _apply(self, data: RankBatch, loss: float) -> list[Measured]:
        number = self._optimizer_steps + 1
        if not math.isfinite(loss):
            raise RunError(f"optimizer step {number}: the loss is {loss}; no weight was changed by this step")
        trainer = self._config.trainer
        lr = learning_rate(trainer.optimizer, self._optimizer_steps, self._config.run.steps * trainer.updates_per_batch)
        if self._writing is not None:
            self._writing.copied()
        self._whole = False
        bundle = trainer.offload_step_mb << 20
        whole = self._offload.present("optimizer") if not bundle else streamed(self._optimizer, self._offload, bundle)
        with whole:
            done = step(self._optimizer, trainer.optimizer, lr)
        if done.grad_norm is not None and not math.isfinite(done.grad_norm):
            raise RunError(f"optimizer step {number}: the gradient norm is {done.grad_norm} at a loss of {loss:.6g}")
        self._optimizer_steps = number
        return [
            *report(done, lr, scaled=self._dtype is torch.float16),
            Measured("throughput/trained_tokens", data.batch.num_action_tokens),
            Measured("packing/cost_imbalance", data.cost_imbalance),
            Measured("packing/largest_tokens", data.largest_tokens),
        ]

    def score_tokens(self, token_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Log-probs of tokens 1.. of one sequence at temperature 1, float32 [n - 1]; equal on every rank."""
        trainer = self._config.trainer
        multiple = trainer.pipeline_parallel if trainer.virtual_pipeline > 1 else 1
        with self._offload.present("parameters"):
            return score_tokens(self._runner, token_ids, self._layout, multiple)

    def weight_metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Hugging Face name, dtype and full shape of everything `weights` yields, in its order."""
        return metadata(self._shape, self._dtype)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter, whole, by Hugging Face name, in `model.dtype`; all ranks must run through it together."""
        with self._offload.present("parameters"):
            yield from export(self._chunks, self._dtype)

    def parameters_at_hand(self) -> AbstractContextManager[None]:
        """Within, the views of `holdings` have their values."""
        return self._offload.present("parameters")

    def holdings(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """What this rank holds of them, as blocks and views of its parameters, in the same order each time."""
        return holdings(self._chunks)

    def held_step(self) -> int | None:
        """The loop's step whose weights these are; None while an update has changed some of them and is not done."""
        return self._step if self._whole else None

    def begin_save(self, folder: Path, step: int, *, snapshot: bool = False, local: Path | None = None) -> None:
        """Start to write this rank's shards under `folder`, or there as links to `local` on this node; `step`: of the
        loop. `snapshot`: of a copy, so that training may go on before `finish_save`."""
        with self._offload.present("parameters", "optimizer"):
            self._writing = checkpoint.begin_save(
                folder,
                self._chunks,
                self._optimizer,
                self._config.trainer,
                self._writer.at(local),
                step=step,
                optimizer_steps=self._optimizer_steps,
                snapshot=snapshot or self._offload.moves,
            )
            if self._offload.moves:
                self._writing.copied()

    def save_written(self) -> bool:
        """Whether `finish_save` need not wait for this rank."""
        return self._writing is None or self._writing.written()

    def finish_save(self) -> dict[str, manifest.FileEntry]:
        """Wait for all ranks' shards and seal the checkpoint; entries of this rank's files, by their names.

        Raises:
            RunError: a file could not be written.
        """
        if self._writing is None:
            raise RuntimeError("begin_save() comes before finish_save()")
        writing, self._writing = self._writing, None
        entries = writing.finish()
        self._saved = sum(entry.bytes for entry in entries.values()), writing.seconds
        return entries

    def take_saved(self) -> tuple[int, float]:
        """Bytes of this rank's files of the checkpoint finished since this was asked last, and seconds of writing."""
        saved, self._saved = self._saved, (0, 0.0)
        return saved

    def restore(self, folder: Path) -> int:
        """Load what `begin_save` wrote, at any layout; returns the loop's step.

        Raises:
            UserError: as `checkpoint.restore`.
        """
        with self._offload.present("parameters", "optimizer"):
            found = checkpoint.restore(folder, self._chunks, self._optimizer, self._config.trainer)
        self._step, self._optimizer_steps = found
        return self._step

    def export_hf(self, folder: Path) -> None:
        """Write the policy as a Hugging Face checkpoint; `folder` appears whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        export_hf(folder, self._config.model.path, self.weight_metadata(), self.weights())

    def to_device(self) -> None:
        """The devices are the ranks': the parameters come back, until `to_host`. Gradients and optimizer state come
        when an update wants them.

        Raises:
            RunError: there is no room for them.
        """
        self._offload.bring("parameters")

    def to_host(self) -> None:
        """The devices are the engines': everything that `trainer.offload` names leaves.

        Raises:
            RunError: on a GPU, more than `trainer.offload_residue_mb` is left beside what stays.
        """
        self._offload.clear()

    def memory(self) -> tuple[Measured, ...]:
        """This rank's state: its size by class, what of it is on the device and the arena in host memory, MB; and the
        seconds that moving took since this was asked last."""
        return (*self._offload.measured(), *(self._reference.measured() if self._reference else ()))

    def peak_memory_bytes(self) -> int:
        """Most memory this rank has held: resident on a CPU, allocated by torch on a GPU."""
        return device.peak_memory_bytes()

    def close(self) -> None:
        """Leave the process groups. Safe to call twice."""
        parallel.shutdown()
