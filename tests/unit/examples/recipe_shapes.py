"""Build the rank-0 model of each recipe on the meta device, in a process of its own: prints parameters by file, JSON.

Megatron-Core's groups are real objects over torch's fake process group, so that one process stands for one of 64.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from stare_megatron.models.families import read_hf_config
from stare_megatron.trainer import bridge, model, parallel
from tests.unit.examples.recipes import RECIPES, Recipe


def built(recipe: Recipe) -> int:
    """Parameters of rank 0."""
    from megatron.core import parallel_state, tensor_parallel

    made = recipe.load()
    t = made.trainer
    torch.distributed.init_process_group("fake", rank=0, world_size=t.world_size, store=FakeStore())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=t.tensor_parallel,
        pipeline_model_parallel_size=t.pipeline_parallel,
        context_parallel_size=t.context_parallel,
        expert_model_parallel_size=t.expert_parallel,
        expert_tensor_parallel_size=t.expert_tensor_parallel,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    with torch.device("meta"):
        chunk = model._chunk(model.policy_config(read_hf_config(made.model.path), torch.bfloat16, t), 0, made.window)
    bridge.mark_split([chunk])
    assert {parameter.device.type for parameter in chunk.parameters()} == {"meta"}
    parallel.shutdown()
    return sum(parameter.numel() for parameter in chunk.parameters())


if __name__ == "__main__":
    sys.stdout.write(json.dumps({recipe.file: built(recipe) for recipe in RECIPES}))
