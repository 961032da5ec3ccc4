"""Run a function on N processes that can form a torch.distributed group, and collect what each returns.

    results = launch("parity_worker:run", 2, {"cases": ...}, timeout=120)

The function is named as "module:function" (a module of this folder, or one importable from the project's root), takes
(rank: Rank, **arguments) and returns something that pickles. It is started by `python launch.py` with the environment
torchrun would give. When a rank fails or the time is up, the error shows the tail of every rank's output; on a time-out
each rank first dumps the stack of every thread.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stare_megatron.host.ports import free_port as free_port

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Rank:
    """Where a worker is; the fields that `parallel.initialize` asks for."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def launch(target: str, ranks: int, arguments: dict[str, Any] | None = None, timeout: float = 180.0) -> list[Any]:
    """Return values of `target` by rank.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps((target, arguments or {})))
        port = free_port()
        processes = [_start(folder, rank, ranks, port) for rank in range(ranks)]
        try:
            fault = _wait(processes, time.monotonic() + timeout)
            if fault:
                for p in processes:
                    if p.poll() is None:
                        p.send_signal(signal.SIGUSR1)  # faulthandler: every thread's stack
                time.sleep(1.0)
        finally:
            for p in processes:
                p.kill()
                p.wait()
        if fault:
            tails = [f"--- rank {r}\n{(folder / f'log{r}').read_text()[-4000:]}" for r in range(ranks)]
            raise AssertionError("\n".join([f"{target} on {ranks} ranks: {fault}", *tails]))
        return [pickle.loads((folder / f"result{r}").read_bytes()) for r in range(ranks)]


def _start(folder: Path, rank: int, ranks: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
        )


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> str:
    """Empty when all ended well, else what went wrong first."""
    while time.monotonic() < deadline:
        codes = [p.poll() for p in processes]
        for rank, code in enumerate(codes):
            if code:
                return f"rank {rank} ended with code {code}"
        if all(code == 0 for code in codes):
            return ""
        time.sleep(0.05)
    return "time is up"


def _worker(folder: Path) -> None:
    import faulthandler

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    target, arguments = pickle.loads((folder / "arguments").read_bytes())
    module, _, function = target.partition(":")
    here = Rank(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
    )
    result = getattr(importlib.import_module(module), function)(here, **arguments)
    (folder / f"result{here.rank}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    # What is pickled may name classes of this module by its name in the caller.
    sys.modules["launch"] = sys.modules["__main__"]
    _worker(Path(sys.argv[1]))
