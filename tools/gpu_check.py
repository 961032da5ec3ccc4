"""Check on one GPU machine, offline, what one GPU can show: a report of what works, how fast, and what does not.

python tools/gpu_check.py [--parts a,b] [--out DIR] [--minutes 8] [--device cuda|cpu] [--together N] [--list]

Each part runs in a process of its own with a time limit. DIR/report.txt and report.json are rewritten after every part,
so a run that is cut off leaves what it knew; DIR/parts/ has logs. Ctrl-C and SIGTERM end the parts that run, with all
they started. Exit code 0: every part that ran is right; 1: a part failed, ran out of time or was ended; 2: wrong
arguments. `--device cpu` runs what a CPU can of the same parts. `--together 4` runs
four parts at a time, beside each other on one GPU: for what is right, not for times and memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.gpu_check_parts import report, runner  # noqa: E402
from tools.gpu_check_parts.outcome import Status  # noqa: E402
from tools.gpu_check_parts.parts import NOT_CHECKED, PARTS, Part  # noqa: E402

_LEAST_S = 10.0  # a part is not begun with less
_BESIDE_SLACK = 1.5
_CPU_SLACK = 4.0  # parts' limits are for a GPU machine, which has more CPUs too


def environment(device: str) -> dict[str, str]:
    """Of every part: the device, this checkout first on the path, nothing that asks a network."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {
        "PYTHONPATH": path,
        "STARE_DEVICE": device,
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }


def check(parts: Mapping[str, Part], device: str, out: Path, seconds: float, together: int = 1) -> list[runner.Result]:
    """Run the parts in their order, `together` at a time, within `seconds` in all; the report is in `out` after
    each."""
    about = report.machine(device, ROOT)
    work, shared = out / "parts", out / "shared"
    for folder in (work, shared):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    until = time.monotonic() + seconds
    results: dict[str, runner.Result] = {}
    writing = threading.Lock()

    def run(part: Part, stop: threading.Event) -> None:
        print(f"{part.name}: {part.about}", flush=True)
        result = _one(part, device, work / part.name, shared, until - time.monotonic(), stop, beside=together > 1)
        print(f"{part.name}: {result.status.value}, {result.seconds:.0f} s {result.reason}", flush=True)
        with writing:
            results[part.name] = result
            report.write(out, about, [results[name] for name in parts if name in results], NOT_CHECKED)

    try:
        with _until_signalled() as stop, ThreadPoolExecutor(together) as pool:
            list(pool.map(lambda part: run(part, stop), parts.values()))
    finally:
        shutil.rmtree(shared, ignore_errors=True)  # models: gigabytes
    return [results[name] for name in parts]


@contextmanager
def _until_signalled() -> Iterator[threading.Event]:
    """Set by the first request to end, in place of what it would do."""
    stop = threading.Event()
    asked = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in asked}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one(
    part: Part, device: str, folder: Path, shared: Path, left: float, stop: threading.Event, *, beside: bool
) -> runner.Result:
    if stop.is_set():
        return runner.Result(part.name, Status.SKIPPED, reason=runner.STOPPED)
    if left < _LEAST_S:
        return runner.Result(part.name, Status.SKIPPED, reason="no time left: --minutes")
    seconds = part.seconds * (1.0 if device == "cuda" else _CPU_SLACK) * (_BESIDE_SLACK if beside else 1.0)
    limit = min(seconds, left - runner.GRACE_S) if left > 2 * runner.GRACE_S else left
    command = [sys.executable, "-m", "tools.gpu_check_parts.child"]
    arguments = [part.name, device, str(folder), str(shared), f"{limit:.0f}", "beside" if beside else "alone"]
    result = runner.run(part.name, [*command, *arguments], folder, limit, environment(device), ROOT, stop)
    for big in ("runs", "cpu-float32", f"{device}-bfloat16", f"{device}-float16"):  # checkpoints: more gigabytes
        _keep_text(folder / big)
    return result


def _keep_text(folder: Path) -> None:
    """Remove weights and checkpoints of what a part left."""
    for name in ("checkpoints", "checkpoint", "hf", "exports"):
        for found in folder.rglob(name):
            shutil.rmtree(found, ignore_errors=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="names, with commas between them (default: all)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder of the report (default: gpu-check)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="parts at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="show the parts and stop")
    asked = parser.parse_args(argv)
    if asked.list:
        for part in PARTS.values():
            print(f"{part.name:<18} at most {part.seconds:3.0f} s  {part.about}")
        for name, why in NOT_CHECKED.items():
            print(f"{name:<18} not checked    {why}")
        return 0
    names = asked.parts.split(",") if asked.parts else list(PARTS)
    if asked.together < 1:
        parser.error(f"--together: {asked.together} parts at a time; 1 or more")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"--parts: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    out = asked.out.absolute()
    if out.exists() and any(out.iterdir()) and not (out / report.JSON).is_file():
        parser.error(f"--out: {out} holds something else than an earlier report")
    chosen = {name: PARTS[name] for name in PARTS if name in names}
    results = check(chosen, asked.device, out, 60 * asked.minutes, asked.together)
    print(f"\n{(out / report.TEXT).read_text()}\n{out / report.TEXT}")
    return int(any(r.status in (Status.FAILED, Status.TIMED_OUT) for r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
