"""What a rank does in the tests of Transformer Engine's Adam: the real class on a CPU, with kernels in torch, beside
Megatron-Core's local layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from launch import Rank

from stare_megatron.host import device
from tests.te import adam_kernels

# Megatron-Core takes what it finds when it is imported.
with mock.patch.object(device, "has_transformer_engine", return_value=True):
    adam_kernels.install()
    import offload_cases
    from step_cases import Overrides, Ports, make_config, save, start

    from stare_megatron.trainer import optimizer, precise, shares, spec
    from stare_megatron.trainer.rank import TrainerRank


def _prepared() -> None:
    """Local layers, and an Adam that makes the one tensor it has on a GPU here."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    serving = spec.Providers("torch", "transformer_engine", False)
    optimizer.providers = lambda: serving  # type: ignore[assignment]
    made: Any = FusedAdam.__init__

    @functools.wraps(made)  # whose signature upstream looks at
    def on_cpu(*args: Any, **kwargs: Any) -> None:
        tensor = torch.tensor
        with mock.patch.object(torch, "tensor", lambda *a, **k: tensor(*a, **k | {"device": "cpu"})):
            made(*args, **kwargs)

    FusedAdam.__init__ = on_cpu  # type: ignore[method-assign]


_prepared()


def offloaded(rank: Rank, **arguments: Any) -> Any:
    """`offload_cases.updates`."""
    return offload_cases.updates(rank, **arguments)


def saved(rank: Rank, **arguments: Any) -> Any:
    """`offload_cases.saves`."""
    return offload_cases.saves(rank, **arguments)


def compared(rank: Rank, *, checkpoint: Path, cases: dict[str, Overrides], folder: Path) -> dict[str, Any]:
    """Of each case: an update of a plain rank and of one that is precise; states, saved by each and restored by each,
    and what the plan counts."""
    ports, found = Ports(rank), {}
    for name, overrides in cases.items():
        trainer = overrides["trainer"]
        plain = {key: value for key, value in trainer.items() if key != "optimizer"} | {"optimizer": {"lr": 1e-3}}
        configs = {
            "plain": make_config(checkpoint, overrides | {"trainer": plain}),
            "precise": make_config(checkpoint, overrides),
        }
        seen: dict[Any, Any] = {}
        for kind, config in configs.items():
            ours = start(ports.next(), config)
            if kind == "precise":
                seen["types"] = _types(ours)
            done = offload_cases.update(ours, config, 1)[0]
            seen[kind, "norm"] = done.updates[0]["update/grad_norm"]
            seen[kind, "state"] = _state(ours)
            seen[kind, "sizes"] = dict(ours._offload.sizes())
            save(ours, folder / f"{name}-{kind}", 1)
            seen[kind, "went on"] = offload_cases.update(ours, config, 2)[1], _state(ours)
            ours.close()
        for source in configs:
            for kind, config in configs.items():
                ours = start(ports.next(), config)
                assert ours.restore(folder / f"{name}-{source}") == 1
                seen[source, kind] = _state(ours)
                seen[source, kind, "went on"] = offload_cases.update(ours, config, 2)[1], _state(ours)
                ours.close()
        seen["plan"] = _plan(checkpoint, configs, rank.rank)
        found[name] = seen
    return found


def _types(trainer: TrainerRank) -> list[str]:
    """Of gradients, and of all there is in the optimizer's state before the first step."""
    for part in shares.parts(trainer._optimizer):
        precise.make_state(part.optimizer)
    inner = [part.optimizer for part in shares.parts(trainer._optimizer)]
    kept = {f"{key} {t.dtype}" for opt in inner for state in opt.state.values() for key, t in state.items()}
    buffers: Any = [buffer for chunk in trainer._chunks for buffer in vars(chunk)["buffers"]]
    return sorted(kept | {f"gradients {buffer.grad_data.dtype}" for buffer in buffers})


def _state(trainer: TrainerRank) -> dict[str, Any]:
    """By parameter's number: float32 master weights and moments of this rank's range, and the parameter."""
    found: dict[str, Any] = {}
    read: Callable[..., Any]
    for i, part in enumerate(shares.parts(trainer._optimizer)):
        read = precise.read if precise.is_precise(part) else shares._references
        for n, (parameter, first, stop) in enumerate(shares._ranges(part)):
            if first < stop:
                tensors = read(part, parameter)
                own = parameter.detach().view(-1)[first:stop]
                found[f"{i}.{n}"] = {
                    "model": own.float().numpy().copy(),
                    **{k: tensors[k].detach().float().numpy().copy() for k in ("param", "exp_avg", "exp_avg_sq")},
                }
    return found


def _plan(checkpoint: Path, configs: dict[str, Any], rank: int) -> dict[str, dict[str, int]]:
    """Bytes by class, as the plan counts them for this rank."""
    from stare_megatron.models.families import read_hf_config
    from stare_megatron.plan.parameters import Layout, held

    found = {}
    for kind, config in configs.items():
        layout = Layout.of(config.trainer)
        state = held(read_hf_config(checkpoint), layout, rank).state(
            config.model.dtype, sharded=layout.sharded, adam=config.trainer.optimizer
        )
        counted = dataclasses.asdict(state) | {"optimizer": state.optimizer}
        found[kind] = {key: counted[key] for key in ("parameters", "gradients", "optimizer")}
    return found
