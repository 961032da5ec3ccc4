"""What a model's own `load_weights` is found to need, and boxes put into it: vLLM's reload on a model of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from stare_megatron.models.boxes import Box
from stare_megatron.sync.bake import Needs, bake
from stare_megatron.sync.load import Loader
from stare_megatron.sync.source import ParamSpec

SPECS = [
    ParamSpec("a", torch.float32, (6, 4)),
    ParamSpec("b", torch.float32, (6, 4)),
    ParamSpec("n", torch.float32, (4,)),
]
Load = Callable[[torch.Tensor, torch.Tensor], Any]


class Model(torch.nn.Module):
    """Worker 1 of 2: `fused` has the second halves of a's and of b's rows, each in a way of its own; `norm` is n."""

    def __init__(self, load_b: Load | None = None, load_a: Load | None = None) -> None:
        super().__init__()
        self.fused = torch.nn.Linear(4, 6, bias=False)
        self.norm = torch.nn.LayerNorm(4, bias=False)
        self._load = {"a": load_a or half, "b": load_b or half}
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        vars(self.fused.weight)["weight_loader"] = self._put

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            parameter: Any = self.norm.weight if name == "n" else self.fused.weight
            loader = parameter.weight_loader if hasattr(parameter, "weight_loader") else default_weight_loader
            loader(parameter, tensor, *([] if name == "n" else [name]))

    def _put(self, param: torch.Tensor, loaded_weight: torch.Tensor, part: str) -> None:
        first = 3 * (part == "b")
        self._load[part](param.data[first : first + 3], loaded_weight)


def half(into: torch.Tensor, tensor: torch.Tensor) -> None:
    into.copy_(tensor.chunk(2)[1])


def scaled(into: torch.Tensor, tensor: torch.Tensor) -> None:
    into.copy_(tensor[3:] * 2)


def turned(into: torch.Tensor, tensor: torch.Tensor) -> None:
    into.copy_(tensor.view(4, 6).t()[3:])


def added(into: torch.Tensor, tensor: torch.Tensor) -> None:
    torch.add(tensor[3:], 1, out=into)


def asked(into: torch.Tensor, tensor: torch.Tensor) -> None:
    into.copy_(tensor[3:] * tensor.max().item())


def spread(into: torch.Tensor, tensor: torch.Tensor) -> None:
    into.copy_(tensor[3:4])


def build(**ways: Any) -> Model:
    model = Model(**ways)
    record_metadata_for_reloading(model)
    return model


def test_blocks_and_where_they_go() -> None:
    model = build()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    needs = bake(model, SPECS)
    assert [(str(n.box), n.target.module, n.target.begin, n.target.shape) for n in needs.cut] == [
        ("a[3:6, 0:4]", "fused", (0, 0), (3, 4)),
        ("b[3:6, 0:4]", "fused", (3, 0), (3, 4)),
        ("n[0:4]", "norm", (0,), (4,)),
    ]
    assert (needs.whole, needs.modules) == ((), ())
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, old) for name, (p, old) in before.items())


@pytest.mark.parametrize("way", [scaled, turned, added, spread])
def test_what_is_more_than_a_copy_of_a_block_comes_whole_with_all_of_its_module(way: Load) -> None:
    needs = bake(build(load_b=way), SPECS)
    assert [str(n.box) for n in needs.cut] == ["n[0:4]"]
    assert [spec.name for spec in needs.whole] == ["a", "b"]
    assert needs.modules == ("fused",)


def test_a_model_that_asks_for_values_gets_everything_whole() -> None:
    needs = bake(build(load_b=asked), SPECS)
    assert (needs.cut, [spec.name for spec in needs.whole]) == ((), ["a", "b", "n"])


def test_a_parameter_that_nothing_goes_into_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"none of the policy's tensors goes into the engine's norm\.weight"):
        bake(build(), SPECS[:2])


@pytest.mark.parametrize("way", [half, scaled, asked])
def test_pieces_in_any_order_give_what_load_weights_gives(way: Load) -> None:
    state = {spec.name: torch.randn(spec.shape) for spec in SPECS}
    model, whole = build(load_b=way), build(load_b=way)
    whole.load_weights(state.items())
    needs = bake(model, SPECS)
    addresses = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        push(model, needs, state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert [p.data_ptr() for p in model.parameters()] == addresses  # which CUDA graphs may know
    assert [str(n.box) for n in bake(model, SPECS).cut] == [str(n.box) for n in needs.cut]


def push(model: Model, needs: Needs, state: dict[str, torch.Tensor]) -> None:
    loader = Loader(model, SimpleNamespace(dtype=torch.float32), needs)
    loader.start()
    for need in reversed(needs.cut):
        for box in need.box.rows(5):
            loader.take(need, box, state[box.name][tuple(map(slice, box.begin, box.end))])
    for number, spec in enumerate(needs.whole):
        for box in Box(spec.name, (0,) * len(spec.shape), spec.shape).rows(5):
            loader.take_whole(number, box, state[box.name][tuple(map(slice, box.begin, box.end))])
    loader.finish()


def test_what_has_not_come_is_named() -> None:
    model = build()
    needs = bake(model, SPECS)
    loader = Loader(model, SimpleNamespace(dtype=torch.float32), needs)
    loader.start()
    loader.take(needs.cut[0], needs.cut[0].box, torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match=r"the weights of fused \(and 1 more\) have not come completely"):
        loader.finish()
