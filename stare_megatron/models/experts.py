"""What families with a mixture of experts have in common: fields of config.json and tensors of a layer. No torch."""

from __future__ import annotations

from stare_megatron.errors import UserError
from stare_megatron.models.shape import Fields, Split, Tensor

MOST_EXPERTS = 10_000


def expert_number(f: Fields, name: str, other: str, default: int | None = None) -> int:
    """The number of experts, under the family's `name` or what transformers 5 may write for it.

    Raises:
        UserError: two that differ, or none that can be.
    """
    written = f.agreeing(f.take(name, int, None), f.take(other, int, None), name)
    number: int = (default or 0) if written is None else written
    if not 1 <= number <= MOST_EXPERTS:
        raise UserError(f"{f.path}: {name} = {written!r:.20} should be from 1 to {MOST_EXPERTS:,}")
    return number


def every_layer(f: Fields) -> None:
    """Qwen's fields of dense layers among those with experts, as long as there are none."""
    f.only("decoder_sparse_step", 1)
    f.only("mlp_only_layers", [])


def shared(block: str) -> tuple[Tensor, ...]:
    """An expert that every token meets and its gate. `block`: Hugging Face's name of it."""
    own = "mlp.shared_experts"
    return (
        Tensor(Split.GATED, (f"{block}.gate_proj.weight", f"{block}.up_proj.weight"), f"{own}.linear_fc1.weight"),
        Tensor(Split.ROW, (f"{block}.down_proj.weight",), f"{own}.linear_fc2.weight"),
        Tensor(Split.REPLICATED, (f"{block}_gate.weight",), f"{own}.gate_weight"),
    )


def routed(block: str, gate: str, up: str, down: str) -> tuple[Tensor, ...]:
    """The half of a layer that experts serve: its norm, router and experts. The arguments: Hugging Face's names of the
    block and of an expert's three matrices."""
    each, local, saved = f"{block}.experts.{{e}}", "mlp.experts.local_experts.{e}", "mlp.experts.experts"
    return (
        Tensor(Split.REPLICATED, ("post_attention_layernorm.weight",), "pre_mlp_layernorm.weight"),
        Tensor(Split.REPLICATED, (f"{block}.gate.weight",), "mlp.router.weight"),
        Tensor(
            Split.EXPERT_GATED,
            (f"{each}.{gate}.weight", f"{each}.{up}.weight"),
            f"{local}.linear_fc1.weight",
            "mlp.experts.linear_fc1.weight{e}",
            f"{saved}.linear_fc1.weight",
        ),
        Tensor(
            Split.EXPERT_ROW,
            (f"{each}.{down}.weight",),
            f"{local}.linear_fc2.weight",
            "mlp.experts.linear_fc2.weight{e}",
            f"{saved}.linear_fc2.weight",
        ),
    )
