"""A random Qwen2 checkpoint small enough to start an engine on: 2 layers, hidden 64, 2 heads of 32, 112 words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

VOCAB = 112
EOS = 2


def make_model(tied: bool, seed: int) -> Qwen2ForCausalLM:
    """Weights large enough that log-probs differ clearly from one seed to another. float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS,
        initializer_range=0.15,
        dtype=torch.float32,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(model: Qwen2ForCausalLM, folder: Path) -> Path:
    """As a checkpoint folder with a tokenizer of the words w3 ... w111."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """Of the words w3 ... w111."""
    words = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """transformers' log-prob of each token given those before it, float32 [n - 1]."""
    ids = torch.tensor([list(token_ids)])
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0].numpy()


def weights(model: Qwen2ForCausalLM) -> dict[str, torch.Tensor]:
    """Parameters by Hugging Face name, layer by layer; a tied head is not among them."""
    return {name: p.detach() for name, p in model.named_parameters()}
