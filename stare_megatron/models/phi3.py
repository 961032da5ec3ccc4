"""Phi-3 and Phi-4 (transformers `Phi3ForCausalLM`): Llama's layers, whose queries, keys and values are one tensor of a
checkpoint, and gate and up another. The long contexts of `longrope` are refused."""

from __future__ import annotations

from stare_megatron.models.mistral import within
from stare_megatron.models.shape import Family, Fields, ModelShape, Split, Tensor, dense_layer, read_dense

_STACKED = {Split.QKV: "self_attn.qkv_proj.weight", Split.GATED: "mlp.gate_up_proj.weight"}


def read(f: Fields) -> ModelShape:
    f.only("attention_bias", False)
    for name in ("resid_pdrop", "embd_pdrop"):
        f.only(name, 0.0)
    f.take("original_max_position_embeddings", int, 4096)  # of longrope
    window = f.take("sliding_window", int, None)
    return within(read_dense(f, "phi3", qkv_bias=False, qk_norm=False, norm_eps=1e-5), window)


def layer(shape: ModelShape) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(t.layout, (_STACKED[t.layout],), t.local) if t.layout in _STACKED else t for t in dense_layer(shape)
    )


FAMILY = Family("phi3", "Phi3ForCausalLM", read, layer)
