"""One trainer rank, through everything a run asks of it.

python -m tools.gpu_check_parts.one_rank MODEL DTYPE LAYERS FOLDER OPTIMIZER

LAYERS: `torch` or `transformer_engine`. OPTIMIZER: more keys of `[trainer.optimizer]`, as JSON.
STARE_DEVICE says where. FOLDER/found.json: what it computed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from safetensors.torch import load_file

from stare_megatron.config import Config, parse
from stare_megatron.host import device
from stare_megatron.host.ports import free_port
from stare_megatron.types import Control

if TYPE_CHECKING:
    from stare_megatron.trainer.rank import TrainerRank

PROBE = np.arange(5, 69, dtype=np.int32)
STEPS = 3


def configuration(model: Path, dtype: str, more: Mapping[str, Any] = {}, **trainer: Any) -> Config:
    """A rank alone on `model`: 16 sequences of random tokens a step. `more`: keys of the optimizer."""
    optimizer: dict[str, Any] = {"lr": 1e-4, **more}
    if dtype == "float16":  # far from an overflow, whose step would have no gradient norm to compare
        optimizer["initial_loss_scale"] = 256.0
    return parse(
        {
            "run": {"name": "gpu-check", "steps": STEPS},
            "model": {"path": str(model), "dtype": dtype},
            "data": {"train": ["none.jsonl"], "max_prompt_tokens": 32},
            "reward": {"name": "math"},
            "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 64},
            "trainer": {"micro_batch_tokens": 1024, "optimizer": optimizer} | trainer,
        },
        "gpu_check",
    )


def as_torchrun() -> None:
    """The environment that torchrun would give to a rank alone."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ.update(own | device.trainer_environment())


def steps(trainer: TrainerRank, config: Config, count: int, first: int) -> list[dict[str, float]]:
    """Load, score, update `count` times."""
    from tools.bench_trainer import load

    seen = []
    for number in range(first, first + count):
        load(trainer, config, number)
        entropy = trainer.score().entropy
        (done,) = trainer.update(Control(True, 1.1, 0.9, entropy, entropy + 1.0)).updates
        seen.append({"entropy": entropy, "grad_norm": float(done["update/grad_norm"])})
    return seen


def _restored(trainer: TrainerRank, config: Config, folder: Path) -> str:
    """Save, go on, restore: "" if the rank is what it was."""
    trainer.begin_save(folder, STEPS)
    trainer.finish_save()
    before = trainer.score_tokens(PROBE)
    (went_on,) = steps(trainer, config, 1, 100)
    after = trainer.score_tokens(PROBE)
    if np.array_equal(before, after):
        return "an update changed no log-prob"
    step = trainer.restore(folder)
    if step != STEPS:
        return f"step {step}, not {STEPS}"
    again = trainer.score_tokens(PROBE)
    if not np.allclose(before, again, rtol=0, atol=1e-5):
        return f"log-probs differ by up to {np.abs(before - again).max():.2g}"
    (resumed,) = steps(trainer, config, 1, 100)
    if abs(resumed["grad_norm"] - went_on["grad_norm"]) > 1e-2 * went_on["grad_norm"]:
        return f"the gradient norm is {resumed['grad_norm']:.6g}, it was {went_on['grad_norm']:.6g}"
    return ""


def _exported(trainer: TrainerRank, folder: Path) -> str:
    """Export: "" if the files hold the rank's weights, bit for bit."""
    trainer.export_hf(folder)
    written = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    names = []
    for name, tensor in trainer.weights():
        names.append(name)
        if name not in written or not written[name].equal(tensor.cpu()):
            return f"{name} is missing or another"
    return "" if sorted(names) == sorted(written) else f"{sorted(set(written) ^ set(names))} on one side only"


def main(argv: list[str]) -> int:
    model, dtype, layers, folder = Path(argv[0]), argv[1], argv[2], Path(argv[3])
    as_torchrun()
    config = configuration(model, dtype, json.loads(argv[4]))
    began = time.perf_counter()
    chosen = mock.patch.object(device, "has_transformer_engine", return_value=layers == "transformer_engine")
    with chosen:  # before anything of Megatron-Core is imported, which takes what it finds
        from stare_megatron.trainer.spec import providers
        from tools.bench_trainer import make_rank

        trainer = make_rank(config)
        found: dict[str, Any] = {"layers": providers().layers, "adam": providers().adam}
        found["steps"] = steps(trainer, config, STEPS, 0)
        found["probe"] = trainer.score_tokens(PROBE).tolist()
        found["restored"] = _restored(trainer, config, folder / "checkpoint")
        found["exported"] = _exported(trainer, folder / "hf")
        found["peak"] = trainer.peak_memory_bytes()
        trainer.close()
    found["seconds"] = time.perf_counter() - began
    (folder / "found.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
