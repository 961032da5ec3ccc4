"""The bridge without Megatron-Core: what is read from config.json, what is refused, how tensors are cut and joined."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.models.entries import full_shapes
from stare_megatron.models.families import FAMILIES, read_hf_config
from stare_megatron.models.layout import check_experts, check_layout, recompute_modules
from stare_megatron.models.rotary import Linear, Llama3, Yarn
from stare_megatron.models.shape import Experts, ModelShape, Split, Tensor
from stare_megatron.models.shards import Checkpoint, merge, read_shard

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 113,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
EMBEDDING = Tensor(Split.VOCAB, ("e",), "embedding.word_embeddings.weight")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def read(folder: Path, fields: Any) -> ModelShape:
    (folder / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return read_hf_config(folder)


def test_what_a_sequence_costs(tmp_path: Path) -> None:
    """Two operations a weight and token; and causal attention, which sees half of s^2 keys in each of two products."""
    dense = read(tmp_path, LLAMA)
    heads, kv = dense.heads * dense.head_dim, dense.kv_groups * dense.head_dim
    weights = dense.hidden * (2 * heads + 2 * kv + 3 * dense.ffn)
    want = 2 * 100 * (dense.layers * weights + dense.hidden * dense.vocab) + 2 * dense.layers * heads * 100**2
    assert dense.sequence_cost(100) == want
    sparse = dataclasses.replace(dense, experts=Experts(number=8, top_k=2, ffn=dense.ffn // 4, normalize=True))
    saved = dense.layers * dense.hidden * (3 * dense.ffn - 3 * dense.ffn // 2 - 8)
    assert sparse.sequence_cost.linear == dense.sequence_cost.linear - 2 * saved
    assert sparse.sequence_cost.quadratic == dense.sequence_cost.quadratic


def test_both_spellings_of_rope(tmp_path: Path) -> None:
    """transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 one table `rope_parameters`."""
    old = read(tmp_path, LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3})
    new = read(tmp_path, LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}})
    assert old == new
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == Llama3(8.0, 1.0, 4.0, 8192)
    assert read(tmp_path, LLAMA).rope_scaling is None


def test_rope_scalings_and_the_longest_sequence(tmp_path: Path) -> None:
    yarn = read(tmp_path, LLAMA | {"rope_scaling": YARN})
    assert yarn.rope_scaling == Yarn(4.0, 32768, 32.0, 1.0, True, pytest.approx(1.1386294))
    assert yarn.max_positions == 131072
    given = YARN | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    assert read(tmp_path, LLAMA | {"rope_scaling": given}).rope_scaling == Yarn(4.0, 32768, 16.0, 2.0, False, 1.5)
    linear = read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.rope_scaling == Linear(2.0)
    plain = read(tmp_path, LLAMA).max_positions
    assert linear.max_positions == 2 * plain
    assert read(tmp_path, LLAMA | {"rope_scaling": LLAMA3}).max_positions == plain


def test_families_differ_where_they_should(tmp_path: Path) -> None:
    llama, qwen2, moe = (read(tmp_path, f) for f in (LLAMA, QWEN2, MOE))
    qwen3 = read(tmp_path, LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    assert [(s.qkv_bias, s.qk_norm) for s in (llama, qwen2, qwen3, moe)] == [
        (False, False),
        (True, False),
        (False, True),
        (False, True),
    ]
    assert moe.experts is not None
    assert (moe.experts.number, moe.experts.top_k, moe.experts.ffn, moe.experts.normalize) == (8, 2, 48, True)
    assert read(tmp_path, QWEN2 | {"use_sliding_window": False, "sliding_window": 4096}) == qwen2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (LLAMA | {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, "GemmaForCausalLM is not supported"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"rope_type": "yarn"}}, "low_freq_factor = 1.0"),
        (LLAMA | {"rope_scaling": YARN | {"mscale": 2.0}}, "rope field mscale = 2.0"),
        (LLAMA | {"rope_scaling": YARN | {"factor": 0.5}}, "should be at least 1"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "rope field attention_factor = 2.0"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLAMA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        (
            LLAMA | {"rope_parameters": LLAMA3, "rope_scaling": {"rope_type": "default"}},
            "rope_parameters = ",
        ),
        (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "two values of rope_theta"),
        (LLAMA | {"rope_scaling": LLAMA3 | {"type": "yarn"}}, "two values of rope_type"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        (LLAMA | {"rope_interleaved": True}, "rope_interleaved = True"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window = 4096"),
        (QWEN2 | {"use_mrope": True}, "use_mrope = True"),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, "from layer 1 on"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias = True"),
        (LLAMA | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers = 1"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide num_attention_heads = 8"),
        (MOE | {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64"),
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        (LLAMA | {"attention_bias": True}, "attention_bias = True"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"vocab_size": "113"}, "vocab_size = '113' should be of type int"),
        (MOE | {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "'hidden_size' is missing"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, fields: Any, says: str) -> None:
    with pytest.raises(UserError) as e:
        read(tmp_path, fields)
    assert says in str(e.value)
    assert "config.json" in str(e.value)
    assert "\n" not in str(e.value)


# config.json of published checkpoints, with the fields that are peculiar to them.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        QWEN2
        | {"use_mrope": False, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 21}
        | {"rope_theta": 10000, "bos_token_id": 151646, "eos_token_id": 151643, "tie_word_embeddings": False},
        {"rope_theta": 10000.0, "tied": False, "qkv_bias": True},
    ),
    "DeepSeek-R1-Distill-Qwen-32B": (
        QWEN2
        | {"max_window_layers": 64, "sliding_window": 131072, "rope_theta": 1000000.0, "use_sliding_window": False},
        {"rope_theta": 1e6},
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        LLAMA
        | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0}
        | {"rope_scaling": LLAMA3, "eos_token_id": 128001},
        {"rope_scaling": Llama3(8.0, 1.0, 4.0, 8192), "qkv_bias": False},
    ),
    "Llama-3.2-1B-Instruct": (
        LLAMA
        | {"rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True, "eos_token_id": [128001, 128008]},
        {"rope_scaling": Llama3(32.0, 1.0, 4.0, 8192), "tied": True},
    ),
    "SmolLM2-135M-Instruct": (
        LLAMA
        | {"is_llama_config": True, "rope_interleaved": False, "tie_word_embeddings": True, "rope_scaling": None}
        | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "rope_theta": 100000},
        {"rope_theta": 1e5, "rope_scaling": None},
    ),
    "Qwen3-30B-A3B": (
        MOE
        | {"max_window_layers": 48, "use_sliding_window": False, "sliding_window": None, "decoder_sparse_step": 1}
        | {
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "output_router_logits": False,
            "attention_bias": False,
        },
        {"qk_norm": True},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(tmp_path: Path, name: str) -> None:
    fields, expected = PUBLISHED[name]
    shape = read(tmp_path, fields)
    assert {key: getattr(shape, key) for key in expected} == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_left_out_is_what_transformers_takes_it_for(tmp_path: Path, model_type: str) -> None:
    """A configuration with sizes only, against the one that transformers makes of it and writes with all fields."""
    import transformers

    sizes = {key: LLAMA[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")}
    experts = {key: MOE[key] for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
    few = sizes | {"model_type": model_type, "num_attention_heads": 32, "max_position_embeddings": 128}
    few |= experts if model_type == "qwen3_moe" else {}
    full = transformers.AutoConfig.for_model(**few).to_dict()
    assert len(full) > 2 * len(few)
    assert read(tmp_path, few) == read(tmp_path, full)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere': no such folder"):
        read_hf_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json: cannot read it: .*not a Hugging Face checkpoint"):
        read_hf_config(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"set model\.path = '{tmp_path}/model'$"):
        read_hf_config(tmp_path)
    with pytest.raises(UserError, match=r"hf download Qwen/Nowhere-1B --local-dir Qwen/Nowhere-1B$"):
        read_hf_config(Path("Qwen/Nowhere-1B"))


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"tensor_parallel": 8}, "4 (key-value heads)"),
        ({"tensor_parallel": 3}, "8 (attention heads)"),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, "2 layers"),
        ({"expert_parallel": 2}, "1 expert(s)"),
    ],
)
def test_layouts_that_do_not_divide(tmp_path: Path, layout: dict[str, int], says: str) -> None:
    ones = {"tensor_parallel": 1, "pipeline_parallel": 1, "virtual_pipeline": 1, "expert_parallel": 1}
    shape = read(tmp_path, LLAMA)
    shape.check_layout(**ones)
    with pytest.raises(UserError, match="does not divide") as e:
        shape.check_layout(**(ones | layout))
    assert says in str(e.value)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("fields", [LLAMA, QWEN2, MOE, PHI3], ids=lambda f: f["model_type"])
def test_shards_join_to_what_they_were_cut_from(tmp_path: Path, fields: dict[str, Any], size: int) -> None:
    shape = read(tmp_path, fields)
    rows = 128 // size
    for tensor in FAMILIES[shape.family].layer(shape):
        wants = full_shapes(tensor, shape)
        whole = {n: torch.randn(w) for n, w in zip(tensor.names, wants, strict=True)}
        save_file(whole, tmp_path / "model.safetensors")
        file = Checkpoint(tmp_path)
        shards = [read_shard(file, tensor, tensor.names, shape, r, size, rows) for r in range(size)]
        for name, joined in zip(tensor.names, merge(tensor, shards, shape), strict=True):
            assert torch.equal(joined, whole[name]), name


@pytest.mark.parametrize("size", [1, 2, 8])
def test_vocabulary_is_padded_with_zeros_and_unpadded(tmp_path: Path, size: int) -> None:
    """113 rows in shards of 16 for TP 8: the last real rank holds one row, and all of its other rows are zero."""
    shape = read(tmp_path, LLAMA)
    whole = torch.randn(113, 64)
    save_file({"e": whole}, tmp_path / "model.safetensors")
    file, rows = Checkpoint(tmp_path), 128 // size
    shards = [read_shard(file, EMBEDDING, ["e"], shape, r, size, rows) for r in range(size)]
    assert all(s.shape == (rows, 64) for s in shards)
    assert torch.equal(merge(EMBEDDING, shards, shape)[0], whole)
    assert not torch.cat(shards)[113:].any()


def test_ranks_of_padding_only(tmp_path: Path) -> None:
    """A vocabulary so small that a rank has no real row."""
    shape = read(tmp_path, LLAMA | {"vocab_size": 20})
    save_file({"e": torch.ones(20, 64)}, tmp_path / "model.safetensors")
    shard = read_shard(Checkpoint(tmp_path), EMBEDDING, ["e"], shape, 3, 4, 32)
    assert shard.shape == (32, 64)
    assert not shard.any()


def test_query_heads_sit_with_their_group(tmp_path: Path) -> None:
    """Megatron-Core's order: for each KV group its query heads, its key head, its value head."""
    shape = read(tmp_path, LLAMA)
    q = torch.arange(8).repeat_interleave(32)[:, None].expand(-1, 64).float()
    k, v = (base + torch.arange(4).repeat_interleave(32)[:, None].expand(-1, 64).float() for base in (100, 200))
    save_file({n: t.contiguous() for n, t in (("q", q), ("k", k), ("v", v))}, tmp_path / "model.safetensors")
    tensor = Tensor(Split.QKV, ("q", "k", "v"), "self_attention.linear_qkv.weight")
    shard = read_shard(Checkpoint(tmp_path), tensor, tensor.names, shape, 1, 2, 0)
    assert shard[::32, 0].tolist() == [4, 5, 102, 202, 6, 7, 103, 203]


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        Checkpoint(tmp_path)
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    file = Checkpoint(tmp_path)
    with pytest.raises(UserError, match="'b' is missing"):
        file.read("b", (2, 3))
    with pytest.raises(UserError, match=r"'a' has shape \(2, 3\), config\.json asks for \(3, 3\)"):
        file.read("a", (3, 3))
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="cannot read the weights"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"world_size": 2, "expert_parallel": 4}, "does not divide the 2 ranks of a pipeline stage"),
        ({"world_size": 2, "tensor_parallel": 2, "expert_parallel": 2}, "does not divide the 2 ranks"),
        ({"world_size": 4, "tensor_parallel": 2, "expert_parallel": 2}, "does not run on CPUs"),
        (
            {"world_size": 2, "tensor_parallel": 2, "expert_parallel": 2}
            | {"megatron": {"expert_tensor_parallel_size": 1}},
            "needs trainer.sequence_parallel = true",
        ),
    ],
)
def test_impossible_layouts(monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], says: str) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device.CPU)
    with pytest.raises(UserError, match=says):
        check_layout(TrainerConfig(**layout), gpus=False)


def test_experts_split_by_tensors_want_sequence_parallelism(tmp_path: Path) -> None:
    dense, moe = read(tmp_path, LLAMA), read(tmp_path, MOE)
    check_experts(TrainerConfig(world_size=2, tensor_parallel=2), dense)
    check_experts(TrainerConfig(world_size=2, tensor_parallel=2, sequence_parallel=True), moe)
    with pytest.raises(UserError, match=r"and a model with experts need trainer\.sequence_parallel = true"):
        check_experts(TrainerConfig(world_size=2, tensor_parallel=2), moe)


def test_recomputed_modules_are_the_models_and_never_attention_alone_by_default(tmp_path: Path) -> None:
    """Upstream's default is the attention's core, which fused kernels recompute anyway."""
    dense, moe = read(tmp_path, QWEN2), read(tmp_path, MOE)

    def of(shape: ModelShape, *modules: Any) -> list[str]:
        return recompute_modules(TrainerConfig(recompute="selective", recompute_modules=list(modules)), shape)

    assert (of(dense), of(moe)) == (["mlp"], ["moe"])
    assert of(dense, "layernorm", "core_attn") == ["layernorm", "core_attn"]
    assert of(moe, "moe_act", "core_attn") == ["moe_act", "core_attn"]
    with pytest.raises(UserError, match="recompute_modules names 'moe_act', but the model has no experts; use 'mlp'"):
        of(dense, "moe_act")
    for without in (dense, moe):
        with pytest.raises(UserError, match="names 'shared_experts', but the model has no expert that is shared"):
            of(without, "shared_experts")
    with pytest.raises(UserError, match="names 'mlp', but the model has experts in every layer; use 'moe'"):
        of(moe, "mlp")
    with pytest.raises(ValueError, match='is for recompute = "selective", it is "full"'):
        TrainerConfig(recompute="full", recompute_modules=["mlp"])


def test_a_driver_can_check_cheaply() -> None:
    code = (
        "import sys, stare_megatron.models.families, stare_megatron.models.layout;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600, check=False).returncode == 0
