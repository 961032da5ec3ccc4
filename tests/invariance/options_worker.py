"""What one rank finds of each option of [trainer.megatron]: that something changed, and that the numbers did not."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import Rank

# Option -> further settings of [trainer], its value, and whether the checkpoint is a mixture of experts.
OPTIONS: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "moe_token_dispatcher_type": ({}, "allgather", True),
    "moe_router_dtype": ({}, "fp64", True),
    "recompute_method": ({"recompute": "full"}, "block", False),
    "recompute_num_layers": ({"recompute": "full", "megatron": {"recompute_method": "block"}}, 2, False),
    "deterministic_mode": ({}, True, False),
}


def run(here: Rank, *, dense: str, experts: str) -> dict[str, tuple[bool, float]]:
    """Option -> (what the layers did was something else, largest difference of the gradients, relative)."""
    from stare_megatron.config import TrainerConfig
    from stare_megatron.trainer import parallel

    parallel.initialize(TrainerConfig(), **dataclasses.asdict(here), seed=1, timeout_s=300)
    found = {}
    for option, (settings, value, moe) in OPTIONS.items():
        path = Path(experts if moe else dense)
        base = settings.get("megatron", {})
        (did, before), (does, after) = (
            _done(path, settings | {"megatron": base | more}) for more in ({}, {option: value})
        )
        found[option] = (did != does, ((after - before).abs().max() / before.abs().max()).item())
    parallel.shutdown()
    return found


def _done(path: Path, settings: dict[str, Any]) -> tuple[Any, Any]:
    """What the layers did in a forward and backward pass, and its gradients."""
    import torch
    from model_worker import _build, _packed, _sequences

    model = _build(path, **settings)
    with _counted(model) as counts:
        out = model(**_packed(_sequences(112)))[0]
        (out * torch.linspace(-1, 1, out.shape[1])).sin().sum().backward()
    kinds = [type(part.token_dispatcher).__name__ for part in model.modules() if hasattr(part, "token_dispatcher")]
    exact = model.module.embedding.word_embeddings.deterministic_mode
    return (dict(counts), kinds, exact), torch.cat([p.main_grad.flatten() for p in model.module.parameters()])


@contextlib.contextmanager
def _counted(model: Any) -> Iterator[collections.Counter[str]]:
    """Forward calls by module, and the types that the router's scores are computed in."""
    counts: collections.Counter[str] = collections.Counter()
    hooks = [
        part.register_forward_pre_hook(lambda m, args, name=name: counts.update([name]))
        for name, part in model.named_modules()
    ]
    for name, part in model.named_modules():
        if name.endswith("router"):
            gate = part.gating

            def gating(x: Any, gate: Any = gate) -> Any:
                scores = gate(x)
                counts.update([str(scores.dtype)])
                return scores

            part.gating = gating
    yield counts
    for hook in hooks:
        hook.remove()
