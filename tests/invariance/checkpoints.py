"""Tiny random Hugging Face checkpoints made by transformers, one a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 112,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 32}),
    "llama3": ("LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "qwen2": ("Qwen2Config", {"hidden_size": 128, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
        },
    ),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "phi3": ("Phi3Config", {"hidden_size": 128, "eos_token_id": 2, "pad_token_id": None}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "hidden_size": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "mixtral": ("MixtralConfig", {"head_dim": 32, "num_local_experts": 4}),
}
# Tied where the family above is not, and the other way round; the two architectures of DeepSeek-R1-Distill.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "r1_qwen": ("Qwen2Config", {"hidden_size": 128, "use_sliding_window": False, "max_window_layers": 4}),
    "r1_llama": ("LlamaConfig", {"head_dim": 32, "rope_parameters": _LLAMA3}),
    "qwen3_tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe_tied": ("Qwen3MoeConfig", FAMILIES["qwen3_moe"][1] | {"tie_word_embeddings": True}),
    "mistral_tied": ("MistralConfig", {"head_dim": 32, "sliding_window": 100, "tie_word_embeddings": True}),
    "phi3_tied": ("Phi3Config", FAMILIES["phi3"][1] | {"tie_word_embeddings": True}),
    "qwen2_moe_tied": (
        "Qwen2MoeConfig",
        FAMILIES["qwen2_moe"][1] | {"tie_word_embeddings": True, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "mixtral_tied": ("MixtralConfig", FAMILIES["mixtral"][1] | {"tie_word_embeddings": True}),
}
EXPERTS = tuple(name for name, (kind, _) in (FAMILIES | VARIANTS).items() if "Moe" in kind or kind == "MixtralConfig")
# Stretched contexts beside Llama 3's, and one with a window on attention. Their weights have the names of the family's.
STRETCHED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("LlamaConfig", {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "window": ("MistralConfig", {"head_dim": 32, "sliding_window": 33}),
    "yarn": (
        "Qwen2Config",
        {
            "hidden_size": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint `name` under `folder`, random by `seed`; weights large enough that every part matters."""
    import torch
    import transformers

    kind, fields = (FAMILIES | VARIANTS | STRETCHED)[name]
    config = getattr(transformers, kind)(**(_COMMON | fields))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0)
    path = folder / name
    model.save_pretrained(path)
    return path
