"""Every family in a real vLLM: what a Megatron-Core rank exports, pushed into an engine that had other weights, gives
transformers' log-probs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
from launch import Rank, launch
from safetensors.torch import load_file, save_file

from stare_megatron.config import InferenceConfig, TrainerConfig

if importlib.util.find_spec("vllm") is None:  # importing it would take ranks, which import this, long
    pytest.skip("needs vLLM", allow_module_level=True)
pytestmark = pytest.mark.timeout(1200)

QUICK = ("mixtral", "sharded")
RUNS = [("mistral", "gloo"), ("phi3", "sharded"), ("qwen2_moe", "gloo")]
ALL = [(name, how) for name in checkpoints.FAMILIES for how in ("gloo", "sharded")]
WIDE = [case for case in ALL if case not in (QUICK, *RUNS)]
TOKENS = np.random.default_rng(1).integers(3, 112, 100)


def exported(here: Rank, *, path: str, out: str) -> None:
    """On a rank: the checkpoint through Megatron-Core's modules, into the file `out`."""
    from stare_megatron.trainer import parallel
    from stare_megatron.trainer.bridge import export
    from stare_megatron.trainer.model import build_model

    trainer = TrainerConfig()
    parallel.initialize(trainer, **dataclasses.asdict(here), seed=1, timeout_s=300)
    chunks = build_model(Path(path), torch.float32, trainer, torch.device("cpu"), 128)
    save_file({name: tensor.clone() for name, tensor in export(chunks, torch.float32)}, out)
    parallel.shutdown()


@pytest.mark.parametrize(
    ("family", "how"),
    [
        QUICK,
        *(pytest.param(*case, marks=pytest.mark.runs) for case in RUNS),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in WIDE),
    ],
)
def test_logprobs_follow_the_pushed_weights(family: str, how: str, tmp_path: Path) -> None:
    """Both before the push, of the engine's own file, and after it."""
    from tests.e2e.engine_process import EngineProcess
    from tests.e2e.tiny_qwen2 import save_tokenizer

    mine, old = checkpoints.make(family, tmp_path / "mine"), checkpoints.make(family, tmp_path / "old", seed=1)
    save_tokenizer(old)
    if family == "mistral":
        as_published(old, mine)
    launch("test_family_engines:exported", 1, {"path": str(mine), "out": str(tmp_path / "out.safetensors")})
    wanted, before = reference(mine), reference(old)
    config = InferenceConfig(engines=1, vllm={"block_size": 32})
    engine = EngineProcess("engine 0", old, "float32", config, 128, 0, how)
    try:
        engine.call("start")
        np.testing.assert_allclose(engine.call("logprobs", TOKENS), before, atol=1e-4)
        assert np.abs(before - wanted).mean() > 0.1
        push(engine, how, load_file(tmp_path / "out.safetensors"))
        np.testing.assert_allclose(engine.call("logprobs", TOKENS), wanted, atol=1e-4)
    finally:
        engine.stop()


def as_published(folder: Path, other: Path) -> None:
    """With Mistral's own files beside Hugging Face's, here of another model."""
    names = load_file(folder / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "params.json").write_text(json.dumps({"dim": 999, "n_layers": 1}))
    shutil.copy(other / "model.safetensors", folder / "consolidated.safetensors")


def reference(path: Path) -> np.ndarray:
    """transformers' log-probs of TOKENS."""
    import transformers

    from tests.e2e.tiny_qwen2 import reference_logprobs

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return reference_logprobs(model.eval(), TOKENS.tolist())


def push(engine: Any, how: str, state: dict[str, torch.Tensor]) -> None:
    from tests.e2e.test_weight_push import ShardingTrainer, Trainer

    if how == "gloo":
        Trainer([engine], 1, state).push(state)
        return
    ShardingTrainer([engine], 1, state).pusher.push(1)
