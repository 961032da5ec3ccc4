"""Run as `python probes.py EXCLUDED...`: what each patch mends, tried with all patches but the excluded ones.

Prints a JSON object: patch -> the error of its probe, or "" if all is well. One process, for an import of Megatron-Core
takes seconds.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable


def cpu_source() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    assert RotaryEmbedding(kv_channels=32, rotary_percent=1.0).get_emb(8).shape == (8, 1, 1, 32)


def jit_fuser() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable"), "compiled by torch.compile"


def rng_state() -> None:
    import torch
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("mine", 7)
    before = torch.get_rng_state()
    with tracker.fork("mine"):
        drawn = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before), "the outer generator was moved"
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7))), "not the tracked generator"


def router_gemm() -> None:
    import torch
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    out = router_gating_linear(x, w, None, torch.float32)
    out.sum().backward()
    torch.testing.assert_close(out, x @ w.t())


def moe_split_sizes() -> None:
    """An all-to-all with split sizes as the token dispatcher prepares them."""
    import torch
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    sizes = maybe_move_tensor_to_cpu(torch.tensor([3]), as_numpy=True)
    sent, received = torch.rand(3, 2), torch.zeros(3, 2)
    torch.distributed.all_to_all_single(received, sent, output_split_sizes=sizes, input_split_sizes=sizes)
    assert torch.equal(sent, received)


def torch_adam_step() -> None:
    """Six steps with a state_dict round trip in the middle are the six steps without it."""
    import torch

    plain, resumed = _six_steps(resume=False), _six_steps(resume=True)
    torch.testing.assert_close(resumed, plain, rtol=0, atol=0)


def _six_steps(resume: bool) -> object:
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, calculate_per_token_loss=True)
    torch.manual_seed(0)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = DistributedDataParallel(config, ddp_config, module)
    settings = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    for i in range(6):
        if resume and i == 3:
            optimizer.load_state_dict(optimizer.state_dict())
        model.zero_grad_buffer()
        (model(torch.eye(4)) ** 2).sum().backward()
        model.finish_grad_sync()
        optimizer.step()
    return [p.detach().clone() for p in module.parameters()]


def bucket_padding() -> None:
    """The state made for a checkpoint holds each parameter's master weights, whatever bucket it is in."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, calculate_per_token_loss=True)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    module[0].weight.shared_embedding = True  # a bucket of its own, after one of 64 of 128 elements
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp_config, module)
    settings = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    model.zero_grad_buffer()
    (model(torch.eye(4)) ** 2).sum().backward()
    model.finish_grad_sync()
    optimizer.step()
    sharded = {n: ShardedTensor.from_rank_offsets(n, p) for n, p in module.named_parameters()}
    (part,) = optimizer.chained_optimizers
    saved = part.sharded_param_state_fully_reshardable(sharded, metadata={})
    found = {tensors["param"].key: tensors["param"].data for tensors in saved.values()}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[f"optimizer.state.param.{name}"], parameter.detach(), rtol=0, atol=0)


def linear_gemm() -> None:
    """Where oneDNN is said to be faster, no product of a linear layer is made by torch's BLAS."""
    import torch
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear
    from torch.utils._python_dispatch import TorchDispatchMode

    import stare_megatron_patches.linear_gemm as patch

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    patch.onednn_is_faster = lambda: True
    names: list[str] = []
    drawn = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(shape, generator=drawn) for shape in ((200, 1, 256), (320, 256), (200, 1, 320)))
    x.requires_grad_()
    w.requires_grad_()
    with Operators():
        made = linear(x, w, None, False, False, False)
        made.backward(g)
    exact = (x.detach().double(), w.detach().double(), g.double())
    for found, product in (
        (made, exact[0] @ exact[1].t()),
        (x.grad, exact[2] @ exact[1]),
        (w.grad, exact[2][:, 0].t() @ exact[0][:, 0]),
    ):
        torch.testing.assert_close(found.double(), product, atol=1e-4, rtol=0)
    assert not [name for name in names if name.startswith(("aten.mm", "aten.addmm", "aten.bmm"))], names


PROBES: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        cpu_source,
        jit_fuser,
        rng_state,
        router_gemm,
        moe_split_sizes,
        torch_adam_step,
        bucket_padding,
        linear_gemm,
    )
}


def main(excluded: list[str]) -> dict[str, str]:
    import stare_megatron_patches as patches

    patches.PATCHES = tuple(p for p in patches.PATCHES if p not in excluded)
    patches.apply("megatron-core")
    import torch
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    found = {}
    for name, probe in PROBES.items():
        try:
            probe()
        except Exception as e:  # noqa: BLE001  # whatever it is, it is the answer
            found[name] = f"{type(e).__name__}: {e}"
        else:
            found[name] = ""
    torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1:])))
