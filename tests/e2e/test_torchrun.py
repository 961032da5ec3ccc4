"""A trainer rank needs no Ray: the benchmark drives two of them under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests import programs

ROOT = Path(__file__).parents[2]


def test_ranks_train_under_torchrun(tmp_path: Path) -> None:
    import dataclasses

    made = tmp_path / "made"
    make(dataclasses.replace(default_settings("order_free_sum", layers=2, seed=0), max_batches=0), made, 8, 4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = programs.run(
        [
            *torchrun,
            "tools/bench_trainer.py",
            "examples/demo_cpu/run.toml",
            f"model.path={made / 'model'}",
            "trainer.pipeline_parallel=2",
            "trainer.tensor_parallel=1",
            "rollout.prompts_per_step=4",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TP1 PP2 CP1 DP1" in done.stdout
    assert "update tokens/s" in done.stdout
