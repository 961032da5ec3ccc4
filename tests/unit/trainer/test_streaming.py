"""An optimizer step in bundles, on a few tensors: the same bits, counts and copies. With a rank: tests/invariance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stare_megatron_patches

stare_megatron_patches.apply("megatron-core")

from stare_megatron.trainer.offload import Offload  # noqa: E402
from stare_megatron.trainer.streaming import streamed  # noqa: E402
from stare_megatron_patches.torch_adam_step import AdamW  # noqa: E402


class Sparing(AdamW):
    """Does not count for a group that is empty, as Transformer Engine's."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        before = [(group, "step" in group, group.get("step")) for group in self.param_groups if not group["params"]]
        super().step()
        for group, counted, count in before:
            group.pop("step")
            if counted:
                group["step"] = count


class Part:
    """An optimizer of upstream's, as far as its step: three parameters in two groups, one without master weights."""

    def __init__(self, adam: type[AdamW]) -> None:
        torch.manual_seed(0)
        self.own = torch.randn(7)
        masters = [torch.randn(5), torch.randn(9)]
        self.optimizer = adam([{"params": [*masters[:1], self.own]}, {"params": masters[1:]}], lr=0.1)
        self.fp32_from_float16_groups = [masters[:1], masters[1:]]
        self.float16_groups = [[m.bfloat16()] for m in masters]
        self.copied: list[int] = []

    @property
    def params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _copy_main_params_to_model_params(self) -> None:
        pairs = zip(self.fp32_from_float16_groups, self.float16_groups, strict=True)
        for main, model in ((a, b) for mains, models in pairs for a, b in zip(mains, models, strict=True)):
            model.copy_(main)
            self.copied.append(main.numel())

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for p in self.params:
            p.grad = torch.randn(p.shape)
        self.optimizer.step()
        self._copy_main_params_to_model_params()

    def state(self) -> Any:
        adam = self.optimizer
        moments = [{k: v.tolist() for k, v in adam.state[p].items()} for p in self.params]
        steps = [group.get("step") for group in adam.param_groups]
        return [p.tolist() for p in self.params], moments, steps, [m.tolist() for g in self.float16_groups for m in g]


def away(part: Part) -> Offload:
    chunk = SimpleNamespace(
        buffers=[], expert_parallel_buffers=[], module=SimpleNamespace(parameters=lambda: iter([part.own]))
    )
    made = Offload([chunk], part, ["optimizer"], torch.device("cpu"), 0)  # type: ignore[list-item, arg-type]
    made.put_away("optimizer")
    return made


@pytest.mark.parametrize("adam", [AdamW, Sparing])
@pytest.mark.parametrize("size", [1, 80, 10_000])
def test_the_same_as_a_whole_step(adam, size):
    whole, part = Part(adam), Part(adam)
    whole.step(1), part.step(1)
    offload = away(part)
    part.copied.clear()
    for seed in (2, 3):
        whole.step(seed)
        with streamed(part, offload, size):  # type: ignore[arg-type]
            part.step(seed)
        assert [p.untyped_storage().nbytes() for p in part.params] == [0, 28, 0]
    assert part.copied == [5, 9] * 2  # each once a step, and not from what is away
    assert "step" not in vars(part.optimizer)
    assert "_copy_main_params_to_model_params" not in vars(part)
    offload.bring("optimizer")
    assert part.state() == whole.state()


def test_a_step_that_fails_leaves_groups_and_counts_whole():
    part = Part(AdamW)
    part.step(1)
    offload = away(part)
    seen = []

    def fails() -> None:
        seen.append([len(group["params"]) for group in part.optimizer.param_groups])
        if len(seen) == 2:
            raise RuntimeError("spoilt")

    part.optimizer.step = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="spoilt"), streamed(part, offload, 1):  # type: ignore[arg-type]
        part.step(2)
    assert seen == [[1, 0], [1, 0]]
    assert [len(group["params"]) for group in part.optimizer.param_groups] == [2, 1]
    assert [group["step"] for group in part.optimizer.param_groups] == [1, 1]
    assert offload.away == ("optimizer",)
    assert [p.untyped_storage().nbytes() for p in part.params] == [0, 28, 0]
