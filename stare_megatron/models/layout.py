"""How a model may be split over ranks: rules of Megatron-Core that no configuration file knows."""

from __future__ import annotations

from stare_megatron.config import TrainerConfig
from stare_megatron.errors import UserError


def check_layout(config: TrainerConfig, gpus: bool | None) -> None:
    """What `TrainerConfig` cannot know without Megatron-Core's rules. `gpus`: the ranks are on some; None: not known.

    Raises:
        UserError: no such layout.
    """
    ranks = config.world_size // config.pipeline_parallel
    expert_tensor = expert_tensor_parallel(config)
    if ranks % (config.expert_parallel * expert_tensor):
        raise UserError(
            f"trainer.expert_parallel = {config.expert_parallel} x expert tensor parallel {expert_tensor} does not "
            f"divide the {ranks} ranks of a pipeline stage (trainer.world_size / trainer.pipeline_parallel); lower "
            f"one, or set trainer.megatron.expert_tensor_parallel_size = 1"
        )
    if config.expert_parallel > 1 and expert_tensor > 1 and gpus is False:
        # The token dispatcher then gathers tensors of different lengths, which gloo does not.
        raise UserError(
            f"trainer.expert_parallel = {config.expert_parallel} with experts split over {expert_tensor} "
            f"tensor-parallel ranks does not run on CPUs; set trainer.megatron.expert_tensor_parallel_size = 1"
        )
    if config.expert_parallel > 1 and config.tensor_parallel > 1 and not config.sequence_parallel:
        raise UserError("trainer.expert_parallel > 1 with tensor_parallel > 1 needs trainer.sequence_parallel = true")


def expert_tensor_parallel(config: TrainerConfig) -> int:
    """Ranks that split one expert: `trainer.megatron.expert_tensor_parallel_size`, upstream's default is TP."""
    return int(config.megatron.get("expert_tensor_parallel_size") or config.tensor_parallel)


def padded_vocab(vocab: int, tensor_parallel: int) -> int:
    """Rows of the embedding: the next multiple of 128, or of 128 x TP where TP does not divide 128."""
    multiple = 128 if 128 % tensor_parallel == 0 else 128 * tensor_parallel
    return -(-vocab // multiple) * multiple
