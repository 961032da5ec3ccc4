"""Random models of a real one's shape, with a tokenizer whose every id is a word, for parts that need no good one."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from stare_megatron.host.files import whole_folder
from stare_megatron.tasks.base import SPECIAL_WORDS
from stare_megatron.tasks.order_free_sum import OrderFreeSum
from stare_megatron.tasks.tiny_model import make_tokenizer, save
from stare_megatron.types import Prompt


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 model, or with `experts`, of which a token goes to two of width `mlp`, of a Qwen3-MoE; its embedding
    is tied to its head."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    experts: int = 0


TINY = Shape(layers=2, hidden=64, heads=2, kv_heads=2, mlp=192, vocab=112)
SMALL = Shape(layers=4, hidden=256, heads=4, kv_heads=2, mlp=512, vocab=1024)
SHALLOW = Shape(layers=6, hidden=896, heads=14, kv_heads=2, mlp=4864, vocab=32_768)
QWEN2_5_0_5B = Shape(layers=24, hidden=896, heads=14, kv_heads=2, mlp=4864, vocab=151_936)
QWEN2_5_1_5B = Shape(layers=28, hidden=1536, heads=12, kv_heads=2, mlp=8960, vocab=151_936)


TINY_EXPERTS = Shape(layers=2, hidden=64, heads=2, kv_heads=2, mlp=96, vocab=112, experts=8)
EXPERTS_0_5B = Shape(layers=12, hidden=1024, heads=16, kv_heads=4, mlp=512, vocab=32_768, experts=24)


@dataclass(frozen=True)
class _Words(OrderFreeSum):
    """A task's tokenizer with as many words as the model has ids: each of them decodes."""

    total: int = 0

    @property
    def words(self) -> tuple[str, ...]:
        real = super().words
        return (*real, *(f"w{i}" for i in range(self.total - len(SPECIAL_WORDS) - len(real))))


def name(shape: Shape, dtype: str) -> str:
    """A folder's, of its own for every model."""
    return "-".join(map(str, (*dataclasses.astuple(shape), dtype)))


def tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    return make_tokenizer(_Words(total=shape.vocab))


def make(shape: Shape, folder: Path, *, on: str, dtype: torch.dtype) -> int:
    """Write a random checkpoint to `folder` unless it is there; its parameters. `on`: the device it is drawn on."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.05 if shape.hidden < 512 else 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if shape.experts:
        sizes: dict[str, Any] = {"head_dim": shape.hidden // shape.heads, "moe_intermediate_size": shape.mlp}
        config = Qwen3MoeConfig(
            **common, **sizes, num_experts=shape.experts, num_experts_per_tok=2, norm_topk_prob=True
        )
        kind: type[PreTrainedModel] = Qwen3MoeForCausalLM
    else:
        config, kind = Qwen2Config(**common), Qwen2ForCausalLM
    with _alone(folder):
        if (folder / "config.json").is_file():
            with torch.device("meta"):
                return kind(config).num_parameters()
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(on):
                model = kind(config)
        finally:
            torch.set_default_dtype(before)
        with whole_folder(folder) as partial:
            save(model, tokenizer(shape), partial)
        return model.num_parameters()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Parts that run at the same time make a model once."""
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def coin(prompt: Prompt, text: str) -> float:
    """A reward for a model that knows nothing: right for half of all texts, always the same for the same text."""
    return float(zlib.crc32(f"{prompt.id}\n{text}".encode()) & 1)
