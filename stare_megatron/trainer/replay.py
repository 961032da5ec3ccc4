"""Routing replay: the engine's choice of experts in place of the trainer's own, token by token and layer by layer.

Engine and trainer compute router logits in different orders of summation, so that a token whose experts are nearly
equal may go to others in the trainer: its log-prob then differs by far more than rounding. Replay takes the chosen
experts from the engine; their weights still come from the trainer's own logits, so the router is trained.
(Rollout Routing Replay: arXiv 2510.11370.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import RunError
from stare_megatron.models.shape import ModelShape
from stare_megatron.trainer import parallel
from stare_megatron.types import Group, UpdateShare


class _LayerReplay(RouterReplay):
    """One router's choices. Recomputation in a backward pass takes them again in the order of the forward passes, which
    is that in which a chunk's backward passes follow: a pipeline may have begun other micro-batches since."""

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [tokens, experts]; returns those of the chosen experts and their numbers, [tokens, top_k]."""
        if self.target_topk_idx is None:
            assert default_compute_topk is not None
            return default_compute_topk(scores, topk, num_groups, group_topk)
        in_backward = torch._C._current_graph_task_id() != -1  # pyright: ignore[reportAttributeAccessIssue]
        chosen = self.replay_backward_list.pop(0) if in_backward else self.target_topk_idx
        chosen_PK = chosen.long()
        return scores.gather(1, chosen_PK), chosen_PK


class Replay:
    """The routers of this rank's chunks.

    `sequence_parallel`: ranks that share the tokens a router sees, and this rank's number among them.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], sequence_parallel: tuple[int, int]) -> None:
        self._size, self._rank = sequence_parallel
        self._routers: dict[torch.nn.Module, list[_LayerReplay]] = {}
        self.layers: list[int] = []
        """Number, from 0 in the whole model, of each layer whose experts a micro-batch brings, in its order."""
        self._first: dict[torch.nn.Module, int] = {}
        for chunk in chunks:
            routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
            self._first[chunk], self._routers[chunk] = len(self.layers), [_LayerReplay() for _ in routers]
            for router, own in zip(routers, self._routers[chunk], strict=True):
                router.router_replay = own
                assert router.layer_number is not None
                self.layers.append(router.layer_number - 1)

    def forget(self) -> None:
        """After a pass: what it was given."""
        for routers in self._routers.values():
            for router in routers:
                router.clear_indices()

    def set(self, chunk: torch.nn.Module, experts_PLK: torch.Tensor | None) -> None:
        """What the routers of `chunk` choose in its next forward pass, of `layers`; None: what they want."""
        for n, router in enumerate(self._routers[chunk], start=self._first[chunk]):
            if experts_PLK is None:
                router.clear_indices()
            else:
                router.set_target_indices(experts_PLK[:, n].chunk(self._size)[self._rank])


def routed_experts(
    groups: Sequence[Group], share: UpdateShare, layers: Sequence[int], shape: ModelShape
) -> torch.Tensor:
    """The engines' experts of this rank's tokens in `layers`, int16 [T, layers, top_k], in the order of its batch.

    Tokens that no engine has processed (a sequence's last) get the first experts: nothing follows from them.

    Raises:
        RunError: a trajectory came without experts, or with others than this model has.
    """
    assert shape.experts is not None
    number, top_k = shape.experts.number, shape.experts.top_k
    parts: list[np.ndarray[Any, Any]] = [np.empty((0, len(layers), top_k), np.int16)]
    for assignment in share.assignments:
        for sample in assignment.samples:
            trajectory = groups[assignment.group].trajectories[sample]
            found = trajectory.routed_experts
            what = f"trajectory {trajectory.prompt_id}/{sample}"
            if found is None:
                raise RunError(f"{what}: its engine returned no experts; inference.routing_replay needs them")
            if found.shape[1:] != (shape.layers, top_k) or (found.size and int(found.max()) >= number):
                raise RunError(
                    f"{what}: experts {found.shape[1:]} of up to {int(found.max(initial=0))} from the engine, but the "
                    f"model has {shape.layers} layers with {top_k} of {number}"
                )
            own = np.broadcast_to(np.arange(top_k, dtype=np.int16), (trajectory.num_tokens, len(layers), top_k)).copy()
            own[: len(found)] = found[:, list(layers)]
            parts.append(own)
    return torch.from_numpy(np.concatenate(parts))


def build_replay(chunks: Sequence[torch.nn.Module], trainer: TrainerConfig) -> Replay:
    """Of the layout's routers."""
    shared = (trainer.tensor_parallel, parallel.tensor_parallel_rank()) if trainer.sequence_parallel else (1, 0)
    return Replay(chunks, shared)
