"""Adam's state in fewer bytes, as Transformer Engine's Adam keeps it, and in float32 in a checkpoint.

Of a bfloat16 parameter with a float32 master weight that Adam keeps the lower 16 bits alone: the upper ones are the
parameter, one higher where the lower begin with a 1 (transformer_engine/common/multi_tensor/adam.cu). It writes the
parameter itself, in place; moments are kept in the types of `trainer.optimizer`.

On disk everything is float32, so that any setting reads what any wrote. Upstream stores the 16 bits as they are, and
widens whole states on the device in between; here it goes through host memory, a parameter after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from stare_megatron.config import OptimizerConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


def settings(optimizer: OptimizerConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's OptimizerConfig."""
    if not optimizer.precision_aware:
        return {}
    types: dict[str, Any] = {key: torch.__dict__[name] for key, name in optimizer.types.items()}
    return {"use_precision_aware_optimizer": True, **types}


def is_precise(part: Any) -> bool:
    """Whether one of the optimizers keeps its state so."""
    return isinstance(part, DistributedOptimizer) and part.config.use_precision_aware_optimizer


def make_state(inner: Any) -> None:
    """Give Transformer Engine's Adam that has done no step the state it begins with."""
    for group in inner.param_groups:
        group.setdefault("step", 0)
        for shard in group["params"]:
            if not inner.state[shard]:
                inner.initialize_state(shard, inner.store_param_remainders and shard.dtype is torch.bfloat16)


@torch.no_grad()
def read(part: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's range of a parameter's master weight ("param") and moments: float32 [n] each, in host memory."""
    inner, shard = part.optimizer, _shard(part, parameter)
    found = {key: inner.get_unscaled_state(shard, key).to("cpu", torch.float32, copy=True) for key in _MOMENTS}
    master = inner.get_unscaled_state(shard, "master_param").detach().cpu()
    if master.dtype is torch.int16:
        found["param"] = joined(shard.detach().cpu(), master)
    else:
        found["param"] = master.to(torch.float32, copy=True)
    return found


@torch.no_grad()
def write(part: Any, parameter: torch.nn.Parameter, values: Mapping[str, torch.Tensor]) -> None:
    """Put what `read` gives in its place; `values` may be changed by it."""
    inner, shard = part.optimizer, _shard(part, parameter)
    for key in _MOMENTS:
        inner.set_scaled_state(shard, key, values[key].to(shard.device))
    master = values["param"].to(shard.device)
    if inner.state[shard]["master_param"].dtype is torch.int16:
        upper, lower = divided(master)
        shard.copy_(upper)
        inner.set_scaled_state(shard, "master_param", lower)
    else:
        inner.set_scaled_state(shard, "master_param", master)


def joined(parameter_N: torch.Tensor, lower_N: torch.Tensor) -> torch.Tensor:
    """float32 master weights of bfloat16 parameters and the int16 that is kept beside each."""
    upper = parameter_N.view(torch.int16).to(torch.int32) - (lower_N < 0).to(torch.int32)
    return ((upper << 16) | (lower_N.to(torch.int32) & 0xFFFF)).view(torch.float32)


def divided(master_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 parameters of float32 master weights, nearest, halves upwards, and the int16 to keep beside each."""
    bits = master_N.view(torch.int32)
    lower = bits.to(torch.int16)  # wraps
    upper = (bits >> 16) + (lower < 0).to(torch.int32)
    return upper.to(torch.int16).view(torch.bfloat16), lower


@contextlib.contextmanager
def by_reference(part: Any) -> Iterator[None]:
    """Within it the state dict of Transformer Engine's Adam has its state as it is, not widened, and loading one takes
    the settings of its groups alone."""
    inner: Any = part.optimizer

    def load(state: Mapping[str, Any]) -> None:
        for group, loaded in zip(inner.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in loaded.items() if key != "params"}

    inner.state_dict = lambda: torch.optim.Optimizer.state_dict(inner)
    inner.load_state_dict = load
    try:
        yield
    finally:
        del inner.state_dict, inner.load_state_dict


def _shard(part: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's range of a parameter, a view of it: the key to its state."""
    group, order = part.model_param_group_index_map[parameter]
    return part.optimizer.param_groups[group]["params"][order]
