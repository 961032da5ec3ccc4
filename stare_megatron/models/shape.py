"""What the bridge knows of a model: its sizes and how its tensors map. Pure Python, cheap to import on a driver."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.errors import UserError
from stare_megatron.models import rotary
from stare_megatron.models.rotary import RopeScaling
from stare_megatron.types import SequenceCost


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer. `normalize`: the weights of the chosen `top_k` are scaled to sum to 1;
    `shared_ffn`: of the expert that every token meets, multiplied by the sigmoid of a gate; 0: there is none."""

    number: int
    top_k: int
    ffn: int
    normalize: bool
    shared_ffn: int = 0

    @property
    def active_ffn(self) -> int:
        """Width of all experts that a token meets."""
        return self.ffn * self.top_k + self.shared_ffn


class Split(enum.Enum):
    """How Megatron-Core splits and stacks a tensor; W is [out, in]."""

    REPLICATED = "replicated"
    ROW = "row"  # split along `in`
    VOCAB = "vocab"  # rows padded, then split
    QKV = "qkv"  # per KV group: its query heads, its key head, its value head; split by group
    GATED = "gated"  # gate over up, each split by rows
    EXPERT_GATED = "expert_gated"  # GATED, for each expert
    EXPERT_ROW = "expert_row"  # ROW, for each expert


@dataclass(frozen=True)
class Tensor:
    """One Megatron-Core parameter and the Hugging Face tensors it is made of.

    `names`: Hugging Face names, `{e}` where the expert's number goes; one of QKV or GATED where Hugging Face stacks
    them, too: all queries over all keys over all values, gate over up. `local`: Megatron-Core's name under the local
    layer spec; `fused`: its name where Transformer Engine fuses the norm into the linear or groups the experts;
    `saved`: its name in a distributed checkpoint (the same under both specs), None where that is `fused` or `local`.
    """

    layout: Split
    names: tuple[str, ...]
    local: str
    fused: str | None = None
    saved: str | None = None

    @property
    def saved_name(self) -> str:
        return self.saved or self.fused or self.local


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only model as read from its config.json. Sizes in units of their dimension; `ffn`: of a dense layer."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    experts: Experts | None

    @property
    def longest(self) -> str:
        """What a refusal of longer sequences says of `max_positions`, which is read from one of these keys."""
        return (
            f"at most {self.max_positions} tokens (max_position_embeddings there, with rope scaling if any, or "
            "sliding_window if that is less)"
        )

    @property
    def active_ffn(self) -> int:
        """Width of the MLP that a token meets, or of all its experts."""
        return self.experts.active_ffn if self.experts else self.ffn

    @property
    def sequence_cost(self) -> SequenceCost:
        """Of a forward pass: two operations for each weight that a token meets, and causal attention's two products,
        of which half is masked. A training pass takes three or four times that, of both parts."""
        heads = self.heads * self.head_dim
        mlp = 3 * self.hidden * self.active_ffn
        if self.experts:
            mlp += self.hidden * (self.experts.number + (self.experts.shared_ffn > 0))
        attention = 2 * self.hidden * (heads + self.kv_groups * self.head_dim)
        weights = self.layers * (attention + mlp) + self.hidden * self.vocab
        return SequenceCost(linear=2.0 * weights, quadratic=2.0 * self.layers * heads)

    def check_layout(
        self, *, tensor_parallel: int, pipeline_parallel: int, virtual_pipeline: int, expert_parallel: int
    ) -> None:
        """Whether the model can be split so.

        Raises:
            UserError: a size that does not divide.
        """
        sizes = [("attention heads", self.heads), ("key-value heads", self.kv_groups), ("MLP", self.ffn)]
        if self.experts and self.experts.shared_ffn:
            sizes.append(("shared expert", self.experts.shared_ffn))
        for what, size in sizes:
            if size % tensor_parallel:
                raise UserError(
                    f"trainer.tensor_parallel = {tensor_parallel} does not divide the model's {size} ({what}); "
                    f"choose a divisor, or another model.path"
                )
        stages = pipeline_parallel * virtual_pipeline
        if self.layers % stages:
            raise UserError(
                f"trainer.pipeline_parallel = {pipeline_parallel} x trainer.virtual_pipeline = {virtual_pipeline} does "
                f"not divide the model's {self.layers} layers; choose a divisor"
            )
        number = self.experts.number if self.experts else 1
        if number % expert_parallel:
            raise UserError(
                f"trainer.expert_parallel = {expert_parallel} does not divide the model's {number} expert(s); "
                f"choose a divisor, or another model.path"
            )


@dataclass(frozen=True)
class Family:
    """One architecture: `read` turns the fields of config.json into a shape, `layer` lists the tensors of one layer."""

    name: str
    architecture: str
    read: Callable[[Fields], ModelShape]
    layer: Callable[[ModelShape], tuple[Tensor, ...]]


# Fields without any effect on the forward pass, by what they are for.
_HARMLESS = {
    # provenance and bookkeeping
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "name_or_path",
    "_commit_hash", "auto_map", "tokenizer_class", "is_llama_config", "transformers.js_config", "unsloth_fixed",
    "unsloth_version", "_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "finetuning_task",
    # training and initial values
    "initializer_range", "router_aux_loss_coef", "output_router_logits", "pretraining_tp",
    # what a call returns
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict",
    "chunk_size_feed_forward",
    # classification heads and encoder-decoders
    "id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder", "is_decoder", "task_specific_params",
    # special tokens and defaults of generation
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "mask_token_id", "max_length",
    "min_length", "do_sample", "temperature", "top_p", "top_k", "typical_p", "num_beams", "num_beam_groups",
    "repetition_penalty", "length_penalty", "early_stopping", "num_return_sequences", "diversity_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
}  # fmt: skip
_REQUIRED = object()
_MOST = 2**31 - 1  # of anything that is counted; beyond it the file is damaged
_MOST_LAYERS = 10_000


class Fields:
    """The fields of a config.json, each of which must be used: what is not understood is refused, never ignored."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self._left = dict(fields)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a field. An int is a float where one is wanted; null is the default."""
        value = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: the field {name!r} is missing; is this a complete checkpoint?")
            return default
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not kind:
            raise UserError(f"{self.path}: {name} = {value!r:.60} should be of type {kind.__name__}")
        if kind is float and not math.isfinite(value):
            raise UserError(f"{self.path}: {name} = {value} should be a finite number")
        return value

    def optional(self, name: str, kind: type, default: Any) -> Any:
        """As `take`, where null is a value of its own: None."""
        if name in self._left and self._left[name] is None:
            return self._left.pop(name)
        return self.take(name, kind, default)

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        """The value of a field that counts something: from 1 on."""
        value = self.take(name, int, default)
        if not 1 <= value <= _MOST:
            raise UserError(f"{self.path}: {name} = {value!r:.20} should be from 1 to {_MOST:,}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse any value of a field but these; absent is allowed."""
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            known = " or ".join(repr(a) for a in allowed)
            raise UserError(f"{self.path}: {name} = {value!r} is not supported (only {known})")

    def rope(self, theta_default: float = 10000.0) -> tuple[float, RopeScaling | None]:
        """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        table, old = self.take("rope_parameters", dict, {}), self.take("rope_scaling", dict, {})
        if table and old and table != old:
            raise UserError(
                f"{self.path}: rope_parameters = {table!r} and rope_scaling = {old!r} contradict each other"
            )
        inner = Fields(self.path, table or old)
        thetas = inner.take("rope_theta", float, None), self.take("rope_theta", float, None)
        theta = self.agreeing(*thetas, "rope_theta")
        if theta is not None and theta <= 0:
            raise UserError(f"{self.path}: rope_theta = {theta} should be positive")
        kinds = inner.take("rope_type", str, None), inner.take("type", str, None)
        kind = self.agreeing(*kinds, "rope_type") or "default"
        scaling = inner._rope_scaling(kind)
        for fields in (inner, self):
            fields.only("partial_rotary_factor", 1.0)
        inner.finish("rope ")
        return theta or theta_default, scaling

    def _rope_scaling(self, kind: str) -> RopeScaling | None:
        match kind:
            case "default":
                return None
            case "linear":
                return rotary.Linear(self._factor())
            case "llama3":
                return rotary.Llama3(
                    factor=self._factor(),
                    low_freq_factor=self.take("low_freq_factor", float),
                    high_freq_factor=self.take("high_freq_factor", float),
                    original_max_positions=self.size("original_max_position_embeddings"),
                )
            case "yarn":
                factor = self._factor()
                return rotary.Yarn(
                    factor=factor,
                    original_max_positions=self.size("original_max_position_embeddings"),
                    beta_fast=self.take("beta_fast", float, 32.0),
                    beta_slow=self.take("beta_slow", float, 1.0),
                    truncate=self.take("truncate", bool, True),
                    attention=self.take("attention_factor", float, rotary.yarn_attention(factor)),
                )
        raise UserError(
            f"{self.path}: rope_type = {kind!r} is not supported (only 'default', 'linear', 'llama3' or 'yarn')"
        )

    def _factor(self) -> float:
        factor = self.take("factor", float)
        if not 1 <= factor <= _MOST:
            raise UserError(f"{self.path}: factor = {factor} of the rotary embedding should be at least 1")
        return factor

    def agreeing(self, one: Any, other: Any, name: str) -> Any:
        """The value of a field that may be written in two places."""
        if one is not None and other is not None and one != other:
            raise UserError(f"{self.path}: two values of {name}, {one!r} and {other!r}, contradict each other")
        return one if one is not None else other

    def no_window(self, layers: int) -> None:
        """Qwen's fields of sliding-window attention, as long as no layer uses it."""
        window = self.take("sliding_window", int, 0)
        full_layers = self.take("max_window_layers", int, 0)
        if self.take("use_sliding_window", bool, False) and window and full_layers < layers:
            raise UserError(
                f"{self.path}: use_sliding_window = true (window {window}, from layer {full_layers} on) is not "
                f"supported; only full attention"
            )

    def finish(self, what: str = "") -> None:
        """Refuse what nobody asked for, unless it is known to change nothing."""
        for name, value in self._left.items():
            if name not in _HARMLESS and value not in (None, False, 0, [], {}):
                field = f"{name if name.isprintable() else repr(name)} = {value!r}"
                raise UserError(f"{self.path}: the {what}field {field:.100} is not supported by this architecture")


def dense_attention(shape: ModelShape) -> tuple[Tensor, ...]:
    """The attention half of a layer, in the order of Hugging Face's files."""
    hf, mc = "self_attn", "self_attention"
    norm = "input_layernorm.weight"
    tensors = [Tensor(Split.REPLICATED, (norm,), norm, f"{mc}.linear_qkv.layer_norm_weight")]
    for part in ("weight", "bias") if shape.qkv_bias else ("weight",):
        names = tuple(f"{hf}.{x}_proj.{part}" for x in "qkv")
        tensors.append(Tensor(Split.QKV, names, f"{mc}.linear_qkv.{part}"))
    if shape.qk_norm:
        tensors += [Tensor(Split.REPLICATED, (f"{hf}.{x}_norm.weight",), f"{mc}.{x}_layernorm.weight") for x in "qk"]
    tensors.append(Tensor(Split.ROW, (f"{hf}.o_proj.weight",), f"{mc}.linear_proj.weight"))
    return tuple(tensors)


def dense_mlp(shape: ModelShape) -> tuple[Tensor, ...]:
    """The gated MLP half of a layer."""
    norm = ("post_attention_layernorm.weight",)
    return (
        Tensor(Split.REPLICATED, norm, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        Tensor(Split.GATED, ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "mlp.linear_fc1.weight"),
        Tensor(Split.ROW, ("mlp.down_proj.weight",), "mlp.linear_fc2.weight"),
    )


def dense_layer(shape: ModelShape) -> tuple[Tensor, ...]:
    """A pre-norm layer of attention and gated MLP."""
    return dense_attention(shape) + dense_mlp(shape)


def _max_positions(written: int, scaling: RopeScaling | None) -> int:
    """The longest sequence, as vLLM computes it (model.py, `_get_and_verify_max_len`)."""
    match scaling:
        case rotary.Linear():
            return int(written * scaling.factor)
        case rotary.Yarn():
            return int(scaling.original_max_positions * scaling.factor)
    return written


def read_dense(
    f: Fields,
    family: str,
    *,
    qkv_bias: bool,
    qk_norm: bool,
    kv_groups: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    rope_theta: float = 10000.0,
) -> ModelShape:
    """The fields all supported families share.

    `kv_groups`, `head_dim`: the family's defaults of `num_key_value_heads` (None: as many as heads) and `head_dim`
    (None: hidden size / heads) where config.json leaves them out; `norm_eps`, `rope_theta`: of these.
    """
    heads, hidden, layers = f.size("num_attention_heads"), f.size("hidden_size"), f.size("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise UserError(f"{f.path}: num_hidden_layers = {layers} should be at most {_MOST_LAYERS:,}")
    f.only("hidden_act", "silu")
    f.only("attention_dropout", 0.0)
    f.only("mlp_bias", False)
    f.only("rope_interleaved", False)
    f.only("layer_types", ["full_attention"] * layers)
    theta, scaling = f.rope(rope_theta)
    shape = ModelShape(
        family=family,
        layers=layers,
        hidden=hidden,
        ffn=f.size("intermediate_size"),
        heads=heads,
        kv_groups=f.size("num_key_value_heads", kv_groups or heads),
        head_dim=f.size("head_dim", head_dim or hidden // heads),
        vocab=f.size("vocab_size"),
        tied=f.take("tie_word_embeddings", bool, False),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_eps=f.take("rms_norm_eps", float, norm_eps),
        max_positions=_max_positions(f.size("max_position_embeddings"), scaling),
        rope_theta=theta,
        rope_scaling=scaling,
        experts=None,
    )
    if heads % shape.kv_groups:
        raise UserError(
            f"{f.path}: num_key_value_heads = {shape.kv_groups} does not divide num_attention_heads = {heads}"
        )
    return shape
