"""An optimizer step that has its state on the device in bundles, never whole.

Upstream's own step does all it does to gradients first; then Adam updates the master weights and these are copied into
the model's parameters. Those two happen here for some parameters after the other, by the same code: Adam works element
by element, so that no bit changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from stare_megatron.trainer.offload import Offload
from stare_megatron.trainer.shares import parts

# Upstream's lists of master weights and of the parameters they are copied into: of its distributed optimizer, of that
# without distribution. Lists of lists, one a parameter group.
_COPIED = (
    ("shard_fp32_from_float16_groups", "model_float16_groups"),
    ("shard_fp32_groups", "model_fp32_groups"),
    ("fp32_from_float16_groups", "float16_groups"),
)


@contextlib.contextmanager
def streamed(optimizer: MegatronOptimizer, offload: Offload, size: int) -> Iterator[None]:
    """Within it a step of `optimizer` brings its state, which is away, in bundles of at most `size` bytes."""
    with contextlib.ExitStack() as stack:
        for part in parts(optimizer):
            stack.enter_context(_streamed(part, offload, size))
        yield


@contextlib.contextmanager
def _streamed(part: Any, offload: Offload, size: int) -> Iterator[None]:
    inner: Any = part.optimizer
    step, masters = inner.step, any(name in vars(part) for name, _ in _COPIED)
    copy = part._copy_main_params_to_model_params if masters else None

    def step_in_bundles() -> None:
        groups = inner.param_groups
        before = [(group["params"], group.get("step")) for group in groups]
        after = [group.get("step") for group in groups]
        params = [p for group in groups for p in group["params"]]
        bundles = offload.bundles(params, inner.state, size)
        try:
            for here in bundles:
                chosen = {id(params[i]) for i in here}
                for group, (whole, count) in zip(groups, before, strict=True):
                    group["params"] = [p for p in whole if id(p) in chosen]
                    _count(group, count)  # a group that is cut counts a step once
                step()
                if copy is not None:
                    _copy_some(part, copy, chosen)
                # Some optimizers do not count for a group that is empty.
                after = [_later(count, group.get("step")) for count, group in zip(after, groups, strict=True)]
        finally:
            bundles.close()  # after an error one is on the device
            for group, (whole, _), count in zip(groups, before, after, strict=True):
                group["params"] = whole
                _count(group, count)

    inner.step = step_in_bundles
    if masters:
        part._copy_main_params_to_model_params = _nothing
    try:
        yield
    finally:
        del inner.step
        if masters:
            del part._copy_main_params_to_model_params


def _nothing() -> None:
    """In place of the copy after the step: the master weights are away again."""


def _later(count: int | None, other: int | None) -> int | None:
    return max((c for c in (count, other) if c is not None), default=None)


def _count(group: dict[str, Any], count: int | None) -> None:
    if count is None:
        group.pop("step", None)
    else:
        group["step"] = count


def _copy_some(part: Any, copy: Any, chosen: Collection[int]) -> None:
    """Upstream's `copy` of master weights into parameters, while its lists hold no more than the chosen ones."""
    lists: dict[str, list[list[torch.Tensor]]] = {}
    some = False
    for masters, models in _COPIED:
        if masters not in vars(part):
            continue
        lists |= {masters: vars(part)[masters], models: vars(part)[models]}
        pairs = [
            [(main, model) for main, model in zip(*groups, strict=True) if id(main) in chosen]
            for groups in zip(lists[masters], lists[models], strict=True)
        ]
        some = some or any(pairs)
        setattr(part, masters, [[main for main, _ in group] for group in pairs])
        setattr(part, models, [[model for _, model in group] for group in pairs])
    try:
        if some:
            copy()
    finally:
        for name, whole in lists.items():
            setattr(part, name, whole)
