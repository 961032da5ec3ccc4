"""vLLM's own CPU worker with quantized weights, given others by pushes: python quantized_worker.py HERE THERE.

Two folders of checkpoints of one model; prints what was found, in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

KIND = "fp8_per_channel"


def worker(model: Path, quantization: str | None) -> tuple[Any, Any]:
    """One that has loaded `model`, and its configuration."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.cpu_worker import CPUWorker

    from stare_megatron.host.ports import free_port

    config = EngineArgs(
        model=str(model),
        dtype="bfloat16",
        quantization=quantization,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 20,
        worker_extension_cls="stare_megatron.sync.worker.ChecksumExtension",
    ).create_engine_config()
    with set_current_vllm_config(config):
        made = CPUWorker(config, 0, 0, f"tcp://127.0.0.1:{free_port()}", is_driver_worker=True)
        made.init_device()
        made.load_model()
    return made, config


def kept(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().clone() for name, p in made.model_runner.get_model().named_parameters()}


def push(made: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """As a sharded push does, in one message a tensor; returns what was found to be needed."""
    from stare_megatron.models.boxes import Box
    from stare_megatron.sync.bake import bake
    from stare_megatron.sync.load import Loader
    from stare_megatron.sync.source import ParamSpec

    model = made.model_runner.get_model()
    needs = bake(model, [ParamSpec(name, t.dtype, tuple(t.shape)) for name, t in weights.items()])
    loader = Loader(model, made.model_config, needs)
    loader.start()
    for need in needs.cut:
        where = tuple(map(slice, need.box.begin, need.box.end))
        loader.take(need, need.box, weights[need.box.name][where])
    for number, spec in enumerate(needs.whole):
        loader.take_whole(number, Box(spec.name, (0,) * len(spec.shape), spec.shape), weights[spec.name])
    loader.finish()
    return needs


def push_whole(made: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """As vLLM's own transports of whole tensors do."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model = made.model_runner.get_model()
    initialize_layerwise_reload(model)
    model.load_weights(list(weights.items()))
    finalize_layerwise_reload(model, made.model_config)


def main(here: Path, there: Path) -> None:
    from safetensors.torch import load_file
    from vllm.config import set_current_vllm_config

    from stare_megatron.sync.loaded import is_quantized
    from stare_megatron.sync.worker import pieces

    one, other = (
        {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()} for folder in (here, there)
    )
    made, config = worker(here, KIND)
    model = made.model_runner.get_model()
    with set_current_vllm_config(config):
        begin = kept(made)
        needs = push(made, other)
        pushed = kept(made)
        push(made, one)
        back = kept(made)
        push_whole(made, other)
        whole = kept(made)
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    matrix = layer.weight.detach().float().t() * layer.weight_scale.detach().float()
    sent = other["model.layers.0.mlp.down_proj.weight"].float()
    found = {
        "types": sorted({str(p.dtype) for p in model.parameters()}),
        "quantized": sorted(path for path, module in model.named_modules() if is_quantized(module)),
        "whole": sorted(spec.name for spec in needs.whole),
        "modules": sorted(needs.modules),
        "cut": sorted({need.box.name for need in needs.cut}),
        "unchanged": [name for name in begin if torch.equal(begin[name], pushed[name])],
        "not back": [name for name in begin if not torch.equal(begin[name], back[name])],
        "other by whole tensors": [name for name in pushed if not torch.equal(pushed[name], whole[name])],
        "error": float((matrix - sent).abs().max() / sent.abs().max()),
        "summed": sorted(piece.name for piece in pieces(model, model.packed_modules_mapping)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    from stare_megatron.host import device

    os.environ.update(device.engine_environment())
    main(Path(sys.argv[1]), Path(sys.argv[2]))
