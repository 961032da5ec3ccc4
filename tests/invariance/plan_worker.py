"""What a rank does in the planner's tests: builds its model and optimizer, takes a step, counts what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import Rank, joined


@dataclass(frozen=True)
class Counted:
    """Elements of parameters; bytes of parameters, gradients, master weights and moments."""

    elements: int
    parameters: int
    gradients: int
    master: int
    moments: int


def run(here: Rank, *, cases: list[dict[str, Any]]) -> list[Counted]:
    """Each case: `path`, `port`, `dtype`, and the fields of a TrainerConfig under `trainer`; all in this process."""
    from stare_megatron.config import TrainerConfig

    found = []
    for case in cases:
        trainer = TrainerConfig(world_size=here.world_size, **case["trainer"])
        with joined(here, trainer, case["port"]):
            found.append(_count(Path(case["path"]), trainer, case["dtype"]))
    return found


def _count(path: Path, trainer: Any, dtype: str) -> Counted:
    import torch

    from stare_megatron.trainer.model import build_model
    from stare_megatron.trainer.optimizer import build_optimizer, step, zero_grad
    from stare_megatron.trainer.rank import DTYPES

    chunks = build_model(path, DTYPES[dtype], trainer, torch.device("cpu"), 128)
    optimizer = build_optimizer(chunks, trainer)
    zero_grad(chunks, optimizer)
    step(optimizer, trainer.optimizer, 1e-6)  # Adam makes its moments now
    buffers = [b for chunk in chunks for b in [*chunk.buffers, *chunk.expert_parallel_buffers]]
    parameters = {id(p): p for chunk in chunks for p in chunk.parameters()}
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters.values()}
    master = moments = 0
    for one in _optimizers(optimizer):
        inner = one.optimizer
        for group in inner.param_groups:
            for p in group["params"]:
                own = p.untyped_storage().data_ptr() not in storages
                master += p.numel() * p.element_size() * own
                moments += sum(x.numel() * x.element_size() for k, x in inner.state[p].items() if k.startswith("exp"))
    return Counted(
        elements=sum(p.numel() for p in parameters.values()),
        parameters=sum(storages.values()),
        gradients=sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        master=master,
        moments=moments,
    )


def _optimizers(optimizer: Any) -> list[Any]:
    """Upstream chains one a kind of parameter; a rank without any of a kind has a stub."""
    chained = optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]
    return [one for one in chained if one.optimizer is not None]
