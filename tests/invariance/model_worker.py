"""What one rank does in the model tests: logits against transformers, attention against its definition."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from launch import Rank

LENGTHS = (17, 5, 33, 33, 8, 1)


def run(here: Rank, *, paths: dict[str, str]) -> dict[str, Any]:
    """Results of every check of this module, by name."""
    from stare_megatron.config import TrainerConfig
    from stare_megatron.trainer import parallel

    parallel.initialize(TrainerConfig(), **dataclasses.asdict(here), seed=1, timeout_s=300)
    found: dict[str, Any] = {f"logits {name}": logits(Path(path)) for name, path in paths.items()}
    found["unpacked"] = packed_or_not(Path(paths["qwen3"]))
    found["attention"] = attention()
    found["frequencies"] = {name: frequencies(table) for name, table in TABLES.items()}
    found["generator"] = seeded_initialisation_leaves_no_trace(Path(paths["qwen3"]))
    found["refused"] = refused()
    parallel.shutdown()
    return found


def _build(path: Path, dtype: Any = None, **trainer: Any) -> Any:
    import torch

    from stare_megatron.config import TrainerConfig
    from stare_megatron.trainer.model import build_model

    return build_model(path, dtype or torch.float32, TrainerConfig(**trainer), torch.device("cpu"), 128)[0]


def _packed(sequences: list[Any]) -> dict[str, Any]:
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [len(s) for s in sequences]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    tokens = torch.cat(sequences)[None]
    return {
        "input_ids": tokens,
        "position_ids": torch.zeros_like(tokens),
        "attention_mask": None,
        "packed_seq_params": params,
    }


def _sequences(vocab: int) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, vocab, (n,), generator=generator) for n in LENGTHS]


def logits(path: Path) -> tuple[float, float, float]:
    """Largest difference from transformers' logits in float32 (packed against one by one), the largest logit, and the
    mean difference in log-probability in bfloat16."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(path, dtype=torch.float32, attn_implementation="eager").eval()
    vocab = model.config.vocab_size
    sequences = _sequences(vocab)
    exact, rounded = _build(path), _build(path, torch.bfloat16)
    with torch.no_grad():
        theirs = torch.cat([model(s[None]).logits[0] for s in sequences])
        ours = exact(**_packed(sequences))[0, :, :vocab]
        coarse = rounded(**_packed(sequences))[0, :, :vocab]
    assert coarse.dtype is torch.bfloat16
    drift = (coarse.float().log_softmax(-1) - theirs.log_softmax(-1)).abs().mean()
    return (ours - theirs).abs().max().item(), theirs.abs().max().item(), drift.item()


def packed_or_not(path: Path) -> tuple[float, float]:
    """Largest differences in logits and in gradients between a pack and its sequences one by one."""
    import torch

    found = []
    for together in (True, False):
        model, sequences = _build(path), _sequences(112)
        packs = [sequences] if together else [[s] for s in sequences]
        parts = [model(**_packed(pack))[0] for pack in packs]
        whole = torch.cat(parts)
        (whole * torch.linspace(-1, 1, whole.shape[1])).sin().sum().backward()
        found.append((whole.detach(), torch.cat([p.main_grad.flatten() for p in model.module.parameters()])))
    (a, grad_a), (b, grad_b) = found
    return (a - b).abs().max().item(), ((grad_a - grad_b).abs().max() / grad_b.abs().max()).item()


def attention() -> tuple[float, float, bool, int]:
    """Packed attention against its definition in float64: largest differences of outputs and gradients; whether a
    sequence's result depends on what it is packed with; and the most score elements computed per useful one, x 100."""
    import torch

    from stare_megatron.trainer.attention import _plan, packed

    torch.manual_seed(0)
    lengths = (3, 0, 40, 1, 12, 40, 39, 7, 100)
    total, heads, groups, size = sum(lengths), 4, 2, 32
    q, k, v = (torch.randn(total, n, size, requires_grad=True) for n in (heads, groups, groups))
    out = packed(q, k, v, lengths, 0.25)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
    q2, k2, v2 = (x.detach().double().requires_grad_() for x in (q, k, v))
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (sequence[:, None] == sequence[None]) & torch.ones(total, total, dtype=torch.bool).tril()
    scores = torch.einsum("qhd,khd->hqk", q2, k2.repeat_interleave(2, 1)) * 0.25
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    exact = torch.einsum("hqk,khd->qhd", probs, v2.repeat_interleave(2, 1))
    exact_grads = torch.autograd.grad((exact * weight).sum(), (q2, k2, v2))
    alone = packed(q[3:43], k[3:43], v[3:43], (40,), 0.25)
    cost = sum(sequences * length**2 for sequences, length in _plan(lengths, q.device).shapes)
    return (
        (out - exact).abs().max().item(),
        max((a - b).abs().max().item() for a, b in zip(grads, exact_grads, strict=True)),
        torch.equal(alone, out[3:43]),
        100 * cost // sum(n * n for n in lengths),
    )


TABLES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 6.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 700,
    },
    "yarn": {"rope_type": "yarn", "factor": 6.0, "original_max_position_embeddings": 700},
    "yarn, bounds not rounded": {
        "rope_type": "yarn",
        "factor": 6.0,
        "beta_fast": 20.0,
        "beta_slow": 3.0,
        "truncate": False,
        "attention_factor": 1.3,
        "original_max_position_embeddings": 700,
    },
    "linear": {"rope_type": "linear", "factor": 6.0},
}


def frequencies(table: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference from transformers' frequencies, with constants that are nobody's, and that of the
    scale of queries and keys."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from stare_megatron.models.rotary import Yarn
    from stare_megatron.models.shape import Fields
    from stare_megatron.trainer import rope

    parameters = table | {"rope_theta": 5000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=dict(parameters))
    theirs, attention = ROPE_INIT_FUNCTIONS[table["rope_type"]](config, torch.device("cpu"))
    theta, scaling = Fields(Path("config.json"), {"rope_parameters": parameters}).rope()
    assert scaling is not None
    plain = 1.0 / (theta ** (torch.arange(0, 64, 2).float() / 64))
    ours = rope.scaled(plain, theta, scaling)
    scale = scaling.attention if isinstance(scaling, Yarn) else 1.0
    return ((ours - theirs) / theirs).abs().max().item(), abs(scale - attention)


def seeded_initialisation_leaves_no_trace(path: Path) -> bool:
    """Building a model draws nothing: the weights come from the file."""
    import torch

    before = torch.get_rng_state()
    _build(path)
    return torch.equal(before, torch.get_rng_state())


def refused() -> dict[str, str]:
    """What is said to options of [trainer.megatron] that cannot be."""
    from stare_megatron.config.upstream import check_megatron
    from stare_megatron.errors import UserError

    said = {}
    for name in ("moe_router_dtyp", "tensor_model_parallel_size", "num_layers", "moe_aux_loss_coeff"):
        try:
            check_megatron({name: 1})
        except UserError as e:
            said[name] = str(e)
        else:
            said[name] = ""
    return said
