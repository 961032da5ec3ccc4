"""Without Transformer Engine and Apex, the distributed optimizer's Adam loses count of its steps.

torch's AdamW keeps `step` with each parameter. Upstream's `DistributedOptimizer.state_dict` needs one to exist, and
`load_state_dict` gives all parameters one shared tensor, so that each step after a resume counts once per parameter.
The fused optimizers keep `step` with the parameter group, and nothing goes wrong. So does this AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch.optim.adam import adam

from stare_megatron_patches import Patch, expect


class AdamW(torch.optim.Optimizer):
    """torch's own fused Adam kernels with the calling convention of Apex's and Transformer Engine's FusedAdam.

    `step` (int) is in the parameter group; the state of a parameter is `exp_avg` and `exp_avg_sq`, of its shape.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("an optimizer step in a CUDA graph needs Transformer Engine's or Apex's Adam")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            # The kernel adds one to each parameter's counter, so each must have its own element.
            counters = torch.full((len(params),), group["step"] - 1, dtype=torch.float32, device=params[0].device)
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                list(counters.unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self._decoupled,
            )


def fix(module: ModuleType) -> None:
    """Make `megatron.core.optimizer` use it as it uses Apex's FusedAdam; nothing to do where a fused one is there."""
    if not module.USING_PYTORCH_OPTIMIZER:
        return
    distributed = module.distrib_optimizer
    expect(distributed.DistributedOptimizer.load_state_dict, 's["step"] = step', "if not HAVE_APEX_OR_TE:")
    expect(
        module._get_megatron_optimizer_based_on_param_groups, 'kwargs["adam_w_mode"] = config.decoupled_weight_decay'
    )
    module.Adam = AdamW  # pyright: ignore[reportAttributeAccessIssue]
    module.USING_PYTORCH_OPTIMIZER = False  # pyright: ignore[reportAttributeAccessIssue]
    distributed.Adam = AdamW
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True


PATCH = Patch(
    package="megatron-core",
    versions=">=0.16.1,<0.20",
    target="megatron.core.optimizer",
    why="After a resume torch's AdamW counts one step per parameter; before the first step nothing can be saved.",
    upstream="megatron/core/optimizer/distrib_optimizer.py: state_dict, load_state_dict",
    remove_when="load_state_dict clones `step` for each parameter and state_dict works before the first step",
    cpu_only=False,
    fix=fix,
)
