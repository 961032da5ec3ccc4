"""Run a function on N processes that can form a torch.distributed group, and collect what each returns.

    results = launch("parity_worker:run", 2, {"cases": ...})

The function is named as "module:function" (a module of this folder, or one importable from the project's root), takes
(rank: Rank, **arguments) and returns something that pickles. It runs in a process of its own with the environment
torchrun would give, forked from one that has imported what takes longest; a rank whose environment is another than that
one's, or on a machine with GPUs, starts from nothing. When a rank fails or the time is up, the error shows the tail of
every rank's output; on a time-out each rank first dumps the stack of every thread.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from stare_megatron.host import device
from stare_megatron.host.ports import free_port as free_port

if TYPE_CHECKING:
    from stare_megatron.config import TrainerConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Rank:
    """Where a worker is; the fields that `parallel.initialize` asks for."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


@contextlib.contextmanager
def joined(here: Rank, trainer: TrainerConfig, port: int) -> Iterator[None]:
    """Within, this process is a rank of the layout `trainer`, for workers that try several; each has a `port`."""
    from stare_megatron.trainer import parallel

    parallel.initialize(
        trainer,
        rank=here.rank,
        world_size=here.world_size,
        local_rank=here.local_rank,
        master_addr=here.master_addr,
        master_port=port,
        seed=5,
        timeout_s=300,
    )
    yield
    parallel.shutdown()  # not after an error: others may still wait in a collective


def launch(
    target: str,
    ranks: int,
    arguments: dict[str, Any] | None = None,
    timeout: float = 900.0,
    *,
    bare: bool = False,
) -> list[Any]:
    """Return values of `target` by rank. `bare`: in processes that have imported nothing before its module.

    Raises:
        AssertionError: a rank failed, or `timeout` seconds passed.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "arguments").write_bytes(pickle.dumps((target, arguments or {})))
        port = free_port()
        processes = [_start(folder, rank, ranks, port, bare) for rank in range(ranks)]
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


class _Process(Protocol):
    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


def _start(folder: Path, rank: int, ranks: int, port: int, bare: bool) -> _Process:
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("PYTEST_CURRENT_TEST", None)
    # Two parents, so that ranks hash strings differently, as processes of their own do.
    parent = _parents.setdefault(rank % 2, _Parent(environment))
    (folder / f"log{rank}").touch()
    if not bare and parent.environment == environment and not device.gpu_names():
        return parent.fork(folder, own)
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment | own,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


class _Parent:
    """A process that has imported what ranks need, and forks them. It ends with this one, whose pipe it reads."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._process: subprocess.Popen[str] | None = None

    def fork(self, folder: Path, own: dict[str, str]) -> _Process:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                cwd=ROOT,
            )
        assert self._process.stdin is not None
        print(json.dumps([str(folder), own]), file=self._process.stdin, flush=True)
        return _Forked(self._process, folder / f"code{own['RANK']}")


_parents: dict[int, _Parent] = {}


class _Forked:
    """A rank that a `_Parent` forks, or is about to. The parent writes its number, and how it ended, to `pid*` and
    `code*` of the launch's folder."""

    def __init__(self, parent: subprocess.Popen[str], code: Path) -> None:
        self._parent, self._code = parent, code

    def poll(self) -> int | None:
        with contextlib.suppress(FileNotFoundError, ValueError):  # not there yet, or still empty
            return int(self._code.read_text())
        return self._parent.poll()

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, ValueError):
            os.kill(int(self._code.with_name(f"pid{self._code.name[4:]}").read_text()), sig)

    def kill(self) -> None:
        while self.poll() is None:  # it may be about to be forked
            self.send_signal(signal.SIGKILL)
            time.sleep(0.01)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


def _wait(processes: list[_Process], deadline: float) -> str:
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


def _fork_ranks() -> None:
    """Serve `_Parent`: one rank a line."""
    for module in ("step_cases", "stare_megatron.trainer.optimizer", "stare_megatron.trainer.bridge"):
        importlib.import_module(module)
    codes: dict[int, Path] = {}

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError, FileNotFoundError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                codes.pop(ended[0]).write_text(str(os.waitstatus_to_exitcode(ended[1])))

    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        folder, own = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            os.environ.update(own)
            _forked(Path(folder))
        codes[pid] = Path(folder, f"code{own['RANK']}")
        Path(folder, f"pid{own['RANK']}").write_text(str(pid))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _forked(folder: Path) -> NoReturn:
    """Be a rank."""
    code = 1
    try:
        log = os.open(folder / f"log{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        _worker(folder)
        code = 0
    except BaseException:  # noqa: BLE001 - goes to the log
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    if len(sys.argv) > 1:
        _worker(Path(sys.argv[1]))
    else:
        _fork_ranks()
