"""What a rank does in the parity tests: two optimizer steps of a causal language model on fixed data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import Rank, joined

VOCAB = 112
LENGTHS = (17, 5, 9, 20, 3, 12, 8, 30, 4, 11, 7, 26, 2, 15, 6, 22)
MICRO_BATCHES = 4


@dataclass(frozen=True)
class Outcome:
    """`losses`, `grad_norms`: of each step. `names`: in the order of export. `exact`: the export before the first step
    equals the checkpoint bit for bit. `weights`: after the last step, on rank 0."""

    losses: list[float]
    grad_norms: list[float]
    names: list[str]
    exact: bool
    weights: dict[str, Any]


def sequences() -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in LENGTHS]


def run(here: Rank, *, cases: list[dict[str, Any]]) -> list[Outcome]:
    """Each case: `path`, `port`, `dtype`, and the fields of a TrainerConfig under `trainer`; all in this process."""
    from stare_megatron.config import TrainerConfig

    outcomes = []
    for case in cases:
        trainer = TrainerConfig(
            world_size=here.world_size,
            optimizer={"lr": 1e-2, "clip_grad": 0.5, "weight_decay": 0.1},  # type: ignore[arg-type]
            **case["trainer"],
        )
        with joined(here, trainer, case["port"]):
            outcomes.append(_train(Path(case["path"]), trainer, case.get("dtype", "float32")))
    return outcomes


def _train(path: Path, trainer: Any, dtype_name: str) -> Outcome:
    import torch
    from safetensors.torch import load_file

    from stare_megatron.trainer import bridge
    from stare_megatron.trainer import optimizer as optimizers
    from stare_megatron.trainer.model import build_model

    dtype = getattr(torch, dtype_name)
    chunks = build_model(path, dtype, trainer, torch.device("cpu"), 128)
    optimizer = optimizers.build_optimizer(chunks, trainer)
    original = load_file(path / "model.safetensors")
    exported = dict(bridge.export(chunks, dtype))
    exact = set(exported) == set(original) and all(torch.equal(exported[k], original[k].to(dtype)) for k in original)
    announced = bridge.metadata(chunks[0].config.shape, dtype)
    exact = exact and announced == [(k, v.dtype, tuple(v.shape)) for k, v in exported.items()]
    losses, norms = [], []
    for _ in range(2):
        optimizers.zero_grad(chunks, optimizer)
        losses.append(_forward_backward(chunks, trainer))
        norms.append(optimizers.step(optimizer, trainer.optimizer, trainer.optimizer.lr).grad_norm)
    after = {k: v.clone() for k, v in bridge.export(chunks, torch.float32)}
    rank = torch.distributed.get_rank()
    return Outcome(losses, norms, list(exported), exact, after if rank == 0 else {})


def _forward_backward(chunks: list[Any], trainer: Any) -> float:
    """The mean cross entropy over all predicted tokens of all sequences."""
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from stare_megatron.trainer import parallel

    mine = sequences()[parallel.data_parallel_rank() :: trainer.data_parallel]
    rows = [_row(mine[m::MICRO_BATCHES], trainer) for m in range(MICRO_BATCHES)]
    total = sum(n - 1 for n in LENGTHS)
    losses = []

    def forward(iterator: Any, chunk: Any) -> Any:
        tokens, labels, packed = next(iterator)
        output = chunk(tokens[None], torch.zeros_like(tokens)[None], None, packed_seq_params=packed)

        def loss_function(logits: Any) -> Any:
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits[0])[:, :VOCAB].float()
            loss = torch.nn.functional.cross_entropy(whole, labels, ignore_index=-100, reduction="sum") / total
            losses.append(loss.item())
            return loss, torch.tensor(0), {}

        return output, loss_function

    iterators = [iter(rows) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=128,
        micro_batch_size=1,
        forward_only=False,
    )
    loss = torch.tensor(float(sum(losses)))
    torch.distributed.all_reduce(loss, group=parallel.dp_cp_group())
    torch.distributed.broadcast(loss, src=parallel.last_stage_rank(), group=parallel.pp_group())
    return loss.item()


def _row(members: list[Any], trainer: Any) -> Any:
    """Tokens and labels of one packed micro-batch on this context-parallel rank, and its PackedSeqParams."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from stare_megatron.trainer import parallel

    cp, rank = trainer.context_parallel, parallel.context_parallel_rank()
    multiple = max(4, 2 * cp) if cp > 1 or trainer.sequence_parallel else 1
    tokens, labels, lengths = [], [], []
    for sequence in members:
        padding = -len(sequence) % multiple
        padded = torch.cat([sequence, sequence.new_zeros(padding)])
        label = torch.cat([sequence[1:], sequence.new_full((padding + 1,), -100)])
        chunk = len(padded) // (2 * cp)
        keep = torch.arange(len(padded))
        if cp > 1:
            parts = keep.split(chunk)
            keep = torch.cat([parts[rank], parts[2 * cp - 1 - rank]])
        tokens.append(padded[keep])
        labels.append(label[keep])
        lengths.append(len(padded))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    return torch.cat(tokens), torch.cat(labels), packed


def reference(path: Path) -> tuple[float, float]:
    """Loss and gradient norm of transformers' model on the same sequences, one by one."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(())
    for sequence in sequences():
        logits = model(sequence[None]).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, sequence[1:], reduction="sum")
    loss = total / sum(n - 1 for n in LENGTHS)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()
