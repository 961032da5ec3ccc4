"""Small Hugging Face checkpoints written by hand: configuration, random weights, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import read_hf_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 113,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
WORDS = 110


def make(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Write CONFIG with `fields`, weights in `dtype` drawn from a seed, a tokenizer and what else travels."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    generator = torch.Generator().manual_seed(0)
    names = hf_names(read_hf_config(folder))
    weights = {name: torch.randn(want, generator=generator).to(dtype) for name, want in names.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(folder, WORDS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def tokenizer(folder: Path, words: int, eos: int = 2) -> None:
    """A word-level tokenizer of `words` tokens, `eos` among them."""
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"w{eos}", unk_token="w0").save_pretrained(folder)
