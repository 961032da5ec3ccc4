"""The parts there are, by worth: what comes first is what one wants to know if time runs out."""

from __future__ import annotations

from dataclasses import dataclass

_HERE = "tools.gpu_check_parts"


@dataclass(frozen=True)
class Part:
    """`where`: "module:function" of a function from `Context` to `Outcome`; `seconds`: most it may take; `about`: what
    it shows."""

    name: str
    where: str
    seconds: float
    about: str


_PARTS = (
    Part("environment", f"{_HERE}.environment:check", 60, "versions, driver, GPU; which libraries were thinned"),
    Part("vllm-operators", f"{_HERE}.libraries:vllm", 60, "one operator of each of vLLM's libraries against torch"),
    Part("flash-attention", f"{_HERE}.libraries:flash_attention", 60, "vLLM's FlashAttention against torch"),
    Part("te-linear", f"{_HERE}.libraries:transformer_engine", 60, "Transformer Engine's linear against torch"),
    Part(
        "kernels", f"{_HERE}.kernels:check", 90, "log-probs, entropy, sensitivity: float64, share of a copy's bandwidth"
    ),
    Part(
        "rank", f"{_HERE}.rank:local", 120, "a trainer rank, local layers, bf16 and fp16: load to export, against a CPU"
    ),
    Part("offload", f"{_HERE}.offload:check", 180, "`trainer.offload`: bits, bytes left, GB/s each way, twenty cycles"),
    Part("transport", f"{_HERE}.transport:check", 120, "weights from one process to another (on a GPU by CUDA IPC)"),
    Part("sharded", f"{_HERE}.sharded:check", 180, "sharded pushes into other processes on the GPU, vLLM's among them"),
    Part("loop", f"{_HERE}.loop:check", 240, "`stare-megatron train`, colocated: sleep, push, probe, save, resume"),
    Part("loop-sharded", f"{_HERE}.loop:sharded", 180, "as `loop`, two steps, pushes sharded and the ranks offloaded"),
    Part("rank-te", f"{_HERE}.rank:transformer_engine", 120, "as `rank`, Transformer Engine's layers"),
    Part("rank-speed", f"{_HERE}.speed:check", 120, "tokens/s and memory of a rank in the shape of Qwen2.5-1.5B"),
    Part("loop-graphs", f"{_HERE}.loop:graphs", 180, "two steps with the engine's CUDA graphs and compiler on"),
    Part("loop-stream", f"{_HERE}.variants:stream", 150, "three steps, the engine asleep with requests in flight"),
    Part("loop-recovery", f"{_HERE}.variants:recovery", 240, "three steps, the engine's process killed in the second"),
    Part("loop-kl", f"{_HERE}.variants:reference", 150, "two steps with a KL to a reference policy"),
    Part("sft", f"{_HERE}.variants:supervised", 150, "`stare-megatron sft`, saved and resumed: the loss falls"),
    Part("rank-adam", f"{_HERE}.rank:precision_aware", 120, "as `rank-te`, Adam with its state in fewer bytes"),
    Part("loop-fp8", f"{_HERE}.variants:quantized", 150, "two steps with engines in float8: probe, mismatch"),
    Part("loop-fp8-ranks", f"{_HERE}.variants:trained_in_float8", 150, "two steps with the ranks' layers in float8"),
    Part("loop-drafts", f"{_HERE}.variants:drafts", 150, "two steps with n-gram drafts: how many are kept"),
    Part("loop-replay", f"{_HERE}.variants:replay", 180, "two steps of a mixture of experts with routing replay"),
)
PARTS = {part.name: part for part in _PARTS}

NOT_CHECKED = {
    "several GPUs": "NCCL pushes, tensor-parallel engines and ranks: one GPU cannot show them",
}
