"""What a rank does in the conversion tests: load a Megatron-Core checkpoint at a layout, compare it, save it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import Rank, joined


def run(here: Rank, *, cases: list[dict[str, Any]]) -> list[list[str]]:
    """For each case the parameters of this rank that differ between the two ways to load them.

    A case: `hf` and `mcore` hold the same weights; they are loaded from each, and saved at this layout to `out`, with
    an optimizer that has stepped where `optimizer` is true. `trainer`: fields of a TrainerConfig; `port`.
    """
    from stare_megatron.config import TrainerConfig

    found = []
    for case in cases:
        trainer = TrainerConfig(world_size=here.world_size, **case["trainer"])
        with joined(here, trainer, case["port"]):
            found.append(_load_and_save(case, trainer))
    return found


def _load_and_save(case: dict[str, Any], trainer: Any) -> list[str]:
    import torch
    from megatron.core import dist_checkpointing

    from stare_megatron.trainer import checkpoint, optimizer, writing
    from stare_megatron.trainer.model import build_model

    out = Path(case["out"])

    def build(mcore: Path | None) -> Any:
        return build_model(Path(case["hf"]), torch.float32, trainer, torch.device("cpu"), 128, mcore)

    chunks, direct = build(Path(case["mcore"])), build(None)
    pairs = [
        (name, one, other)
        for a, b in zip(chunks, direct, strict=True)
        for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True)
    ]
    different = [name for name, one, other in pairs if not torch.equal(one, other)]
    if case.get("optimizer"):
        adam = optimizer.build_optimizer(chunks, trainer)
        optimizer.zero_grad(chunks, adam)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.fill_(0.01)
        optimizer.step(adam, trainer.optimizer, 1e-3)
        writer = writing.Writer(threads=2)
        checkpoint.begin_save(out, chunks, adam, trainer, writer, step=1, optimizer_steps=1, snapshot=False).finish()
        return different
    if torch.distributed.get_rank() == 0:
        out.mkdir(parents=True)
    torch.distributed.barrier()
    state = {f"model{i}": c.module.sharded_state_dict(metadata=dict(checkpoint.CONTENT)) for i, c in enumerate(chunks)}
    dist_checkpointing.save(state, str(out), content_metadata=dict(checkpoint.CONTENT))
    torch.distributed.barrier()
    return different
