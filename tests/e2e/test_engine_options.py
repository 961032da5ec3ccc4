"""Every option of [inference.vllm] that is taken on a CPU reaches vLLM's own configuration, and changes it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from stare_megatron.config import upstream
from stare_megatron.host import device
from tests import programs
from tests.e2e.tiny_qwen2 import make_model, save

VALUES = {
    "max_num_seqs": 7,
    "max_num_batched_tokens": 300,
    "kv_cache_memory_bytes": 1 << 27,
    "block_size": 64,
    "enable_prefix_caching": False,
}
# In a process of its own, which has the environment of an engine's.
CODE = """
import json, sys
from pathlib import Path
from stare_megatron.config import InferenceConfig
from stare_megatron.inference.engine import Engine
from vllm.engine.arg_utils import AsyncEngineArgs

def made(options):
    engine = Engine("engine", Path(sys.argv[1]), "float32", InferenceConfig(vllm=options), 64, 0, "gloo")
    c = AsyncEngineArgs(**engine._args).create_engine_config()
    return [c.scheduler_config.max_num_seqs, c.scheduler_config.max_num_batched_tokens,
            c.cache_config.kv_cache_memory_bytes, c.cache_config.block_size, c.cache_config.enable_prefix_caching]

if __name__ == "__main__":
    values = json.loads(sys.argv[2])
    print(json.dumps([made({}), {key: made({key: value}) for key, value in values.items()}]))
"""


def test_every_option_of_a_cpu_is_tried() -> None:
    assert VALUES.keys() == {name for name, option in upstream.ENGINE_OPTIONS.items() if not option.needs}


@pytest.mark.timeout(1800)
def test_an_option_reaches_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    script = tmp_path / "options.py"
    script.write_text(CODE)
    model = save(make_model(tied=False, seed=0), tmp_path / "model")
    environment = os.environ | device.engine_environment() | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    done = programs.run(
        [sys.executable, str(script), str(model), json.dumps(VALUES)],
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    usual, found = json.loads(done.stdout.splitlines()[-1])
    for number, (key, value) in enumerate(VALUES.items()):
        assert found[key][number] == value, key
        assert usual[number] != value, key
