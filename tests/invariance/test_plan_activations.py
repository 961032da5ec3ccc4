"""What the planner says a layer keeps, against the tensors that autograd saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import pytest
from launch import Rank, launch

from stare_megatron.config import TrainerConfig
from stare_megatron.models.families import read_hf_config
from stare_megatron.plan.activations import Layers, Sizes, kept
from stare_megatron.plan.parameters import Layout

FAMILIES = tuple(checkpoints.FAMILIES)
LENGTHS = {"alike": (64, 64, 64, 64), "mixed": (64, 100, 40, 62)}


def saved(here: Rank, *, paths: dict[str, str], trainer: dict[str, Any]) -> dict[str, float]:
    """On a rank: bytes a token that autograd saves in the whole model in bfloat16, by family and lengths."""
    import dataclasses

    import torch
    from model_worker import _packed

    from stare_megatron.trainer import parallel
    from stare_megatron.trainer.model import build_model

    settings = TrainerConfig(world_size=here.world_size, **trainer)
    parallel.initialize(settings, **dataclasses.asdict(here), seed=1, timeout_s=300)
    found = {}
    for name, path in paths.items():
        model = build_model(Path(path), torch.bfloat16, settings, torch.device("cpu"), 128)[0]
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for kind, lengths in LENGTHS.items():
            tokens = [torch.randint(0, 112, (n,)) for n in lengths]
            bytes_of: dict[int, int] = {}
            alive = []

            def pack(x: Any, bytes_of: Any = bytes_of, alive: Any = alive) -> Any:
                alive.append(x)  # so that no address is used twice
                bytes_of[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                model(**_packed(tokens), rows_R=torch.arange(sum(lengths)))
            found[f"{name} {kind}"] = sum(n for at, n in bytes_of.items() if at not in own) / sum(lengths)
    parallel.shutdown()
    return found


def head_operators(here: Rank, *, path: str) -> list[str]:
    """On a rank: the operators of the output layer's backward pass that write a tensor as large as the logits."""
    import dataclasses

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from stare_megatron.trainer import parallel
    from stare_megatron.trainer.head import Head
    from stare_megatron.trainer.model import build_model
    from stare_megatron.trainer.partials import VocabShard

    parallel.initialize(TrainerConfig(), **dataclasses.asdict(here), seed=1, timeout_s=300)
    model: Any = build_model(Path(path), torch.bfloat16, TrainerConfig(), torch.device("cpu"), 128)[0].module
    hidden = torch.randn(40, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    head, columns = Head(model, VocabShard(0, 112, None), 0), model.output_weight().shape[0]
    how = {"temperature": 1.0, "entropy_gradient": False, "sensitivity": False}
    logprob, _, _ = head.log_probs(hidden, torch.randint(0, 112, (40,)), **how)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype is torch.bfloat16 and out.numel() == 40 * columns:
                seen.append(str(func))
            return out

    with Watch():
        logprob.sum().backward()
    parallel.shutdown()
    return seen


def test_the_gradient_of_the_logits_is_made_once(paths: dict[str, str]) -> None:
    """In place of the logits; the plan counts one copy. (An index of the logits, in place of a view, copies it.)"""
    (seen,) = launch("test_plan_activations:head_operators", 1, {"path": paths["qwen3"]})
    assert any("index_put_" in name for name in seen), "the watch sees the backward"
    assert not any("select_backward" in name or "zeros" in name or "clone" in name for name in seen), seen


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: str(checkpoints.make(name, folder)) for name in FAMILIES}


@pytest.mark.parametrize("trainer", [{}, {"tensor_parallel": 2, "sequence_parallel": True}], ids=["alone", "TP2 SP"])
def test_layers_keep_what_the_plan_says(trainer: dict[str, Any], paths: dict[str, str]) -> None:
    ranks = trainer.get("tensor_parallel", 1)
    found = launch("test_plan_activations:saved", ranks, {"paths": paths, "trainer": trainer})[0]
    layout = Layout.of(TrainerConfig(world_size=ranks, **trainer))
    for name in FAMILIES:
        shape = read_hf_config(Path(paths[name]))
        for kind in LENGTHS:
            each = kept(shape, layout, Layers.CPU, "bfloat16", mixed=kind == "mixed").total
            # Ids, and the final norm with the states that the output layer picks its rows from.
            outer = 16 + 8 * Sizes.of(shape, layout, "bfloat16").stream + 4
            assert shape.layers * each + outer == pytest.approx(found[f"{name} {kind}"], rel=0.02), f"{name} {kind}"
