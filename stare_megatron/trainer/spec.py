"""Which implementation serves each part: Transformer Engine, else Apex, else torch. Decided here, logged once."""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from stare_megatron.host import device
from stare_megatron.trainer.attention import SdpaAttention
from stare_megatron.trainer.norms import RMSNorm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Providers:
    """Who serves what: `layers` (linears, norms, attention), `adam`, and whether weight gradients are accumulated
    inside the GEMM (needs Apex's extension, for the output layer is Megatron-Core's own under either spec)."""

    layers: str
    adam: str
    gradient_accumulation_fusion: bool

    @property
    def transformer_engine(self) -> bool:
        return self.layers == "transformer_engine"


@functools.cache
def providers() -> Providers:
    """The choice of this process."""
    fused = "transformer_engine" if device.has_transformer_engine() else "apex" if device.has_apex() else "torch"
    chosen = Providers(
        layers="transformer_engine" if device.has_transformer_engine() else "torch",
        adam=fused,
        gradient_accumulation_fusion=device.current() is device.Device.CUDA
        and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )
    log.info("layers: %s; Adam: %s; fused weight gradients: %s", *chosen.__dict__.values())
    return chosen


def fusion_settings() -> dict[str, Any]:
    """TransformerConfig fields that follow from the providers."""
    engine = providers().transformer_engine
    return {
        "gradient_accumulation_fusion": providers().gradient_accumulation_fusion,
        "apply_rope_fusion": engine,
        "moe_grouped_gemm": engine,
        "bias_activation_fusion": engine,
        "bias_dropout_fusion": engine,
        "masked_softmax_fusion": False,
        "persist_layer_norm": engine,
        "moe_permute_fusion": False,
    }


def block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers of one model chunk and its final norm."""
    if providers().transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
        norm = RMSNorm
        parts: Any = layer.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = norm
        attention = parts.self_attention.submodules
        attention.core_attention = SdpaAttention
        attention.q_layernorm = attention.k_layernorm = norm if config.qk_layernorm else IdentityOp
        if config.num_moe_experts is not None:
            # Upstream renames the norm before experts in checkpoints as if it were fused into a dense MLP, which
            # Transformer Engine's layers, where no linear follows it, do not: they could not load each other's.
            renamed = parts.sharded_state_dict_keys_map
            parts.sharded_state_dict_keys_map = {k: v for k, v in renamed.items() if "pre_mlp" not in k}
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)
