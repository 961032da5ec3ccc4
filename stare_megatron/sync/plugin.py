"""Entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Make the backend `gloo` known to vLLM's weight-transfer factories. Repeated calls do nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    module = "stare_megatron.sync.gloo"
    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", module, "GlooWeightTransferEngine")
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", module, "GlooTrainerWeightTransferEngine")
