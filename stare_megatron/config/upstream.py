"""The pass-through tables `[trainer.megatron]` and `[inference.vllm]`: options of upstream's that work here.

What is not listed is refused with a reason: an option that the policy's layers ignore would do nothing, and one that
changes what the policy computes would set engine and trainer apart. A new option is a line here and a row of
tests/invariance/options_worker.py (Megatron-Core's) or tests/e2e/test_engine_options.py (vLLM's), which shows what it
does.

Field names are read from the source of upstream's configuration dataclasses, which is parsed and not run: importing
Megatron-Core costs seconds and, without a GPU, needs patches; importing vLLM costs ten seconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.config.inference import InferenceConfig
from stare_megatron.config.trainer import TrainerConfig
from stare_megatron.errors import UserError, nearest, suggest


@dataclass(frozen=True)
class Option:
    """`wants`: the value in words; `fits`: whether a value is one. `needs`: one of `NEEDS`, else it does nothing."""

    wants: str
    fits: Callable[[Any], bool]
    needs: str = ""


NEEDS: Mapping[str, str] = {
    "experts": "it is for a mixture of experts, and model.path has none",
    "transformer_engine": "it is for Transformer Engine's layers, and those here are torch's",
    "recompute_full": 'it is for trainer.recompute = "full"',
    "virtual_pipeline": "it is for trainer.virtual_pipeline > 1",
    "gpu": "it is for GPUs; on a CPU it does nothing, or the run sets it itself",
    "tensor_parallel": "it is for inference.tensor_parallel > 1",
}


def _whole(needs: str = "") -> Option:
    return Option("a whole number from 1 on", lambda v: type(v) is int and 1 <= v < 2**48, needs)


def _flag(needs: str = "") -> Option:
    return Option("true or false", lambda v: type(v) is bool, needs)


def _one_of(*choices: str, needs: str = "") -> Option:
    return Option(" or ".join(f'"{choice}"' for choice in choices), lambda v: v in choices, needs)


MEGATRON_OPTIONS: Mapping[str, Option] = {
    "expert_tensor_parallel_size": _whole("experts"),
    "moe_token_dispatcher_type": _one_of("alltoall", "allgather", needs="experts"),
    "moe_router_dtype": _one_of("fp32", "fp64", needs="experts"),
    "recompute_method": _one_of("uniform", "block", needs="recompute_full"),
    "recompute_num_layers": _whole("recompute_full"),
    "microbatch_group_size_per_vp_stage": _whole("virtual_pipeline"),
    "deterministic_mode": _flag(),
    **dict.fromkeys(
        ("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "moe_permute_fusion"),
        _flag("transformer_engine"),
    ),
    "cp_comm_type": _one_of("p2p", "all_gather", "a2a", needs="transformer_engine"),
}

ENGINE_OPTIONS: Mapping[str, Option] = {
    **dict.fromkeys(("max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"), _whole()),
    "block_size": Option("a multiple of 16", lambda v: type(v) is int and 0 < v < 2**20 and v % 16 == 0),
    "enable_prefix_caching": _flag(),
    "async_scheduling": _flag("gpu"),
    "gpu_memory_utilization": Option(
        "a number above 0 and at most 1", lambda v: type(v) in (int, float) and 0 < v <= 1, "gpu"
    ),
    **dict.fromkeys(("enforce_eager", "enable_chunked_prefill", "disable_cascade_attn"), _flag("gpu")),
    "long_prefill_token_threshold": _whole("gpu"),
    "enable_expert_parallel": _flag("experts"),
    "disable_custom_all_reduce": _flag("tensor_parallel"),
    "compilation_config": Option("a table", lambda v: isinstance(v, dict), "gpu"),
    "cudagraph_capture_sizes": Option(
        "a list of whole numbers", lambda v: isinstance(v, list) and all(type(n) is int and n > 0 for n in v), "gpu"
    ),
    "max_cudagraph_capture_size": _whole("gpu"),
}

_SHAPE = "it follows from the checkpoint, config.json in model.path"
_RUN = "the run sets it itself"
_OURS = "the layers here do not read it"
_ENGINES = "the engines would compute something else than the trainer"
_SAMPLED = "the trainer would not know of what it does to sampling; set rollout.temperature or rollout.top_p"
_PLACED = "the run places engines and their ranks; set inference.engines, inference.tensor_parallel or [cluster]"
_MODEL = "model.path decides the model, for the trainer too"

# Fields that are not settable: a pattern of the whole name, the reason or the cure; the first that fits.
MEGATRON_REFUSED: tuple[tuple[str, str], ...] = (
    ("tensor_model_parallel_size", "set trainer.tensor_parallel instead"),
    ("pipeline_model_parallel_size", "set trainer.pipeline_parallel instead"),
    ("virtual_pipeline_model_parallel_size", "set trainer.virtual_pipeline instead"),
    ("context_parallel_size", "set trainer.context_parallel instead"),
    ("expert_model_parallel_size", "set trainer.expert_parallel instead"),
    ("sequence_parallel", "set trainer.sequence_parallel instead"),
    ("recompute_granularity", "set trainer.recompute instead"),
    ("recompute_modules", "set trainer.recompute_modules instead"),
    ("fp16|bf16|params_dtype|pipeline_dtype|autocast_dtype|enable_autocast", "set model.dtype instead"),
    (
        "num_layers|hidden_size|num_attention_heads|num_query_groups|ffn_hidden_size|kv_channels|normalization"
        "|layernorm_.*|activation_func.*|glu_.*|gated_linear_unit|add_bias_linear|add_qkv_bias|qk_.*|num_moe_experts"
        "|moe_layer_freq|moe_ffn_hidden_size|moe_shared_expert_.*|moe_latent_size|moe_router_(topk.*|pre_softmax|num_groups"
        "|group_topk|score_function|enable_expert_bias|bias_update_rate)|multi_latent_attention|rotary_.*|rope_.*|mrope_.*"
        "|no_rope_freq|original_max_position_embeddings|beta_fast|beta_slow|mscale.*|q_lora_rank|kv_lora_rank|v_head_dim"
        "|softmax_(scale|type)|window_.*|attention_output_gate|experimental_attention_variant|dsa_.*|linear_.*|mtp_.*"
        "|mamba_.*|use_mamba_.*|is_hybrid_model|hete.*|apply_residual_connection_post_layernorm|cache_mla_latents",
        _SHAPE,
    ),
    # Dropout would make the scoring pass, the update and the engines disagree.
    (
        ".*_dropout|use_cpu_initialization|perform_initialization|calculate_per_token_loss|variable_seq_lengths"
        "|overlap_p2p_comm.*|batch_p2p_comm|deallocate_pipeline_outputs|.*_func|timers|transformer_impl",
        _RUN,
    ),
    (".*init_method.*|init_model_with_meta_device", "every parameter is read from the checkpoint"),
    ("fp8|fp8_recipe", "set trainer.fp8 instead"),
    (
        "fp8.*|fp4.*|tp_only_amax_red|.*_in_bf16|first_last_layers_bf16|.*kitchen.*|quant_recipe|moe_router_padding_.*",
        _ENGINES,
    ),
    (
        "moe_(expert_capacity_factor|pad_expert_input_to_capacity|token_drop.*|input_jitter_eps|apply_probs_on_input"
        "|router_force_load_balancing)",
        _ENGINES,
    ),
    (
        "moe_(router_load_balancing_type|aux_loss_coeff|z_loss_coeff)",
        "the loss is the method's alone, and upstream scales these by the number of tokens",
    ),
    (
        "cross_entropy_.*|attention_softmax_in_fp32|apply_query_key_layer_scaling|masked_softmax_fusion|persist_layer_norm",
        _OURS,
    ),
    # pipeline_parallel/fine_grained_activation_offload.py: a pool by shape that only grows, and as many micro-batches a
    # step as in the first.
    (
        "fine_grained_activation_offloading|offload_modules|min_offloaded_tensor_size",
        "upstream keeps a page-locked buffer for every length of a micro-batch, and packs differ in theirs; set "
        'trainer.recompute = "full" instead',
    ),
    (".*cpu_offloading.*", "set trainer.offload for what a rank keeps, trainer.recompute for activations"),
    ("num_layers_in_.*|pipeline_model_parallel_layout|account_for_.*", "the layers are split evenly over the stages"),
    ("inference_.*|flash_decode|use_inference_.*|symmetric_ar_type|mlp_chunks_.*", "the trainer's ranks do not sample"),
)

ENGINE_REFUSED: tuple[tuple[str, str], ...] = (
    ("model|tokenizer", "set model.path instead"),
    ("dtype", "set model.dtype instead"),
    ("max_model_len", "set inference.max_model_len instead"),
    ("tensor_parallel_size", "set inference.tensor_parallel instead"),
    ("seed", "set run.seed instead"),
    ("data_parallel_size", "set inference.engines instead"),
    ("enable_sleep_mode", "set inference.placement instead"),
    ("enable_return_routed_experts", "set inference.routing_replay instead"),
    # Log-probs and weight pushes depend on these.
    (
        "skip_tokenizer_init|generation_config|logprobs_mode|weight_transfer_config|worker_extension_cls"
        "|scheduling_policy",
        "the run depends on its value",
    ),
    (
        "quantization_.*|allow_deprecated_quantization|kv_cache_dtype.*|kv_sharing_fast_prefill|.*sliding_window|swa_.*"
        "|hf_overrides",
        _ENGINES,
    ),
    ("quantization", "set inference.quantization instead"),
    ("speculative_config|spec_.*", "set inference.speculative instead"),
    (
        "logits_processors|override_generation_config|return_sampling_mask|structured_.*|reasoning_.*|diffusion_.*",
        _SAMPLED,
    ),
    (
        "pipeline_parallel_size|.*context_parallel_size|data_parallel_.*|nnodes|node_rank|master_.*|device_ids"
        "|distributed_executor_backend|worker_cls|numa_.*|ray_.*|.*elastic_ep.*|_api_process_.*",
        _PLACED,
    ),
    (
        "model_.*|hf_.*|.*revision|config_format|runner|convert|tokenizer_.*|trust_remote_code|load_format|download_dir"
        "|served_model_name|ignore_patterns|pooler_config|mamba_.*",
        _MODEL,
    ),
    (".*lora.*", "adapters are not trained here"),
    (
        "(.*_)?mm_.*|media_.*|allowed_.*|video_.*|language_model_only|interleave_.*|enable_prompt_embeds",
        "the policy reads text",
    ),
    (
        ".*log_.*|.*_metrics.*|otlp_.*|.*trac.*|profiler_config",
        "what engines report is in the run's own logs and metrics",
    ),
    ("max_logprobs|stream_interval|io_processor_plugin", "the run's requests do not use it"),
)


@functools.cache
def megatron_fields() -> frozenset[str]:
    """Field names of the installed Megatron-Core's TransformerConfig and its bases.

    Raises:
        UserError: Megatron-Core is not installed.
    """
    root = _installed("megatron", "core", "Megatron-Core")
    transformer = root / "transformer" / "transformer_config.py"
    return _fields(transformer, "TransformerConfig", "MLATransformerConfig") | _fields(
        root / "model_parallel_config.py", "ModelParallelConfig"
    )


@functools.cache
def engine_arg_names() -> frozenset[str]:
    """Field names of the installed vLLM's EngineArgs and AsyncEngineArgs.

    Raises:
        UserError: vLLM is not installed.
    """
    return _fields(_installed("vllm", "engine", "vLLM") / "arg_utils.py", "EngineArgs", "AsyncEngineArgs")


def megatron_lacking(trainer: TrainerConfig, *, experts: bool, engine: bool | None) -> frozenset[str]:
    """What of `NEEDS` a run has not. `experts`: the checkpoint has some; `engine`: the layers are Transformer Engine's,
    None: not known yet."""
    have = {
        "experts": experts,
        "transformer_engine": engine is not False,
        "recompute_full": trainer.recompute == "full",
        "virtual_pipeline": trainer.virtual_pipeline > 1,
    }
    return frozenset(need for need, met in have.items() if not met)


def engine_lacking(inference: InferenceConfig, *, experts: bool, gpu: bool | None) -> frozenset[str]:
    """What of `NEEDS` the engines have not, as `megatron_lacking`. `gpu`: they are on GPUs, None: not known yet."""
    have = {"experts": experts, "gpu": gpu is not False, "tensor_parallel": inference.tensor_parallel > 1}
    return frozenset(need for need, met in have.items() if not met)


def check_megatron(table: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
    """Check `[trainer.megatron]`. `lacking`: of `NEEDS`, what this run is known not to have.

    Raises:
        UserError: a key that does not exist, does not work here or would do nothing, or a wrong value; with the cure.
    """
    what = "Megatron-Core's TransformerConfig"
    _check(table, "trainer.megatron", what, MEGATRON_OPTIONS, MEGATRON_REFUSED, megatron_fields(), lacking)


def check_precision_aware(trainer: TrainerConfig, engine: bool | None) -> None:
    """`engine`: as of `megatron_lacking`.

    Raises:
        UserError: `trainer.optimizer.precision_aware` without the Adam that has it.
    """
    if trainer.optimizer.precision_aware and engine is False:
        raise UserError(
            "trainer.optimizer.precision_aware = true needs Transformer Engine's Adam, and ranks here have torch's; "
            "install transformer-engine on a machine with GPUs (docs/gpu.md), or take it out"
        )


def check_engine_args(table: Mapping[str, Any], lacking: Collection[str] = ()) -> None:
    """Check `[inference.vllm]`, as `check_megatron` does.

    Raises:
        UserError: a key that does not exist, does not work here or would do nothing, or a wrong value; with the cure.
    """
    _check(table, "inference.vllm", "vLLM's EngineArgs", ENGINE_OPTIONS, ENGINE_REFUSED, engine_arg_names(), lacking)
    sequences, tokens = table.get("max_num_seqs"), table.get("max_num_batched_tokens")
    if sequences and tokens and tokens < sequences:
        raise UserError(
            f"inference.vllm.max_num_batched_tokens = {tokens} is less than inference.vllm.max_num_seqs = {sequences}, "
            "each of which takes a token a step; raise the one or lower the other"
        )


def refusal(key: str, refused: tuple[tuple[str, str], ...]) -> str:
    """Why a field of upstream's that is no option is not settable."""
    found = next((why for pattern, why in refused if re.fullmatch(pattern, key)), "")
    return found or "it is not among the options that are known to work here, docs/configuration.md"


def _check(
    table: Mapping[str, Any],
    name: str,
    what: str,
    options: Mapping[str, Option],
    refused: tuple[tuple[str, str], ...],
    known: Collection[str],
    lacking: Collection[str],
) -> None:
    for key, value in table.items():
        if key not in known:
            near = nearest(key, known)
            cure = f" It is not settable here: {refusal(near, refused)}" if near and near not in options else ""
            raise UserError(f"{name}.{key}: {what} has no such field{suggest(key, known)}{cure}")
        said, option = f"{name}.{key} = {value!r:.200}", options.get(key)
        if option is None:
            raise UserError(f"{said}: not settable here: {refusal(key, refused)}")
        if not option.fits(value):
            raise UserError(f"{said}: must be {option.wants}")
        if option.needs in lacking:
            raise UserError(f"{said} would do nothing: {NEEDS[option.needs]}; take it out")


def _installed(package: str, folder: str, name: str) -> Path:
    """`folder` of an installed package, which may be a namespace package: its spec has locations then, not a file."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations or () if spec else ()
    found = next((Path(place) / folder for place in places if (Path(place) / folder).is_dir()), None)
    if found is None:
        raise UserError(f"{name} is not installed: install stare_megatron with the extra `cpu` or `gpu`")
    return found


def _fields(source: Path, *classes: str) -> frozenset[str]:
    """Annotated names in the bodies of `classes`, from a Python file that is parsed and not run."""
    return frozenset(
        field.target.id
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
