"""A run outlives the process that wandb starts."""

import os
import subprocess
import sys

import pytest

from stare_megatron.metrics import jsonl

RUN = """
import signal, sys, time
from pathlib import Path
import psutil
from rich.console import Console
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.metrics.sinks import open_sinks
from tests.configs import configuration

sinks = open_sinks(configuration(run={"steps": 10}), Path(sys.argv[1]), 0, True, Console(width=200))
service = [p for p in psutil.Process().children(recursive=True) if "wandb" in " ".join(p.cmdline())]
assert service
for process in service:  # as `ray job stop` and Slurm do
    process.send_signal(signal.SIGTERM)
psutil.wait_procs(service, timeout=120)
values = metrics({"reward/mean": 0.5, "policy/entropy": 0.2, "policy/target_entropy": 0.3, "time/step": 2.0})
for step in (1, 2, 3):
    sinks.log(step, values, ())
    time.sleep(0.5)
sinks.close()
"""


@pytest.mark.parts
def test_a_run_goes_on_without_it(tmp_path):
    """wandb's process ends at SIGTERM, also where the signal is blocked when it is started."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}  # not this process's
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], env=own, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wandb lost its process") == 1
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert [row["step"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]
