"""A conversion from beginning to end: check, plan, write in parallel, manifest, appear; then verify."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from stare_megatron.convert import tasks
from stare_megatron.convert.mapping import mcore_tensors
from stare_megatron.convert.plan import ParallelLayout, Plan, check_disk, make_plan
from stare_megatron.convert.source import COMPANIONS, Kind, Source, resolve
from stare_megatron.convert.torch_dist import COMMON, write_index
from stare_megatron.errors import RunError, UserError
from stare_megatron.host import manifest
from stare_megatron.models import hf_folder

_PARTIAL, _PLAN = ".partial", "plan.json"
_POLL_S = 0.1


@dataclass(frozen=True)
class Options:
    """What the user asked for. `to`: None is the other kind. `dtype`: a key of `plan.DTYPES`, or "keep".

    `check`: read the source once before and compare it with its manifest, where it has one.
    """

    source: Path
    out: Path
    hf: Path | None = None
    to: Kind | None = None
    dtype: str = "keep"
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    processes: int = 1
    file_bytes: int = 4 * 10**9
    check: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a conversion took. `peak_bytes`: most resident memory of one process; `base_bytes`: of that, what it held
    before its first tensor (torch). `reused`: files of an interrupted conversion."""

    plan: Plan
    seconds: float
    written_bytes: int
    reused: int
    base_bytes: int
    peak_bytes: int


def convert(options: Options, console: Console) -> Outcome:
    """Make the folder `options.out`, which appears whole or not at all. What an interrupted conversion of the same
    files has written is used.

    Raises:
        UserError: refused before anything is written, or a source that turns out to be damaged.
        RunError: a process was killed.
    """
    source = resolve(options.source, options.hf)
    to = options.to or (Kind.MCORE if source.kind is Kind.HF else Kind.HF)
    _check_target(options.out, source)
    if options.check:
        check_source(source, console, options.processes)
    plan = make_plan(
        source,
        to=to,
        dtype=options.dtype,
        layout=options.layout,
        file_bytes=options.file_bytes,
        processes=options.processes,
    )
    for name, text in plan.lines(options.layout):
        say(console, name, text)
    partial = options.out.with_name(options.out.name + _PARTIAL)
    try:
        return _write(plan, options, partial, console)
    except OSError as e:
        raise UserError(f"{partial}: cannot write the checkpoint: {e}") from e


def check_source(source: Source, console: Console, threads: int) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        UserError: it is damaged.
    """
    entries = manifest.read(source.root)
    if entries is None:
        say(console, "check", f"no {manifest.NAME} in {source.root}: contents are taken as they are")
        return
    total = sum(entry.bytes for entry in entries.values())
    with bar(console) as shown:
        task = shown.add_task("checking", total=total)
        manifest.verify(source.root, threads=threads, progress=lambda n: shown.advance(task, n))
    say(console, "check", f"{len(entries)} files, {decimal(total)}, as the manifest says")


def _check_target(out: Path, source: Source) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder or remove it")
    if out.absolute().is_relative_to(source.weights.absolute()):
        raise UserError(f"{out}: lies inside the checkpoint to convert; choose another folder")


def _write(plan: Plan, options: Options, partial: Path, console: Console) -> Outcome:
    finished = _go_on(plan, partial)
    check_disk(plan, options.out, sum(done.entry.bytes for done in finished))
    todo = [file for file in plan.files if file.name not in {done.name for done in finished}]
    if finished:
        say(console, "go on", f"{len(finished)} of {len(plan.files)} files were written before")
    job = tasks.Job(plan.source.weights, partial, plan.shape, plan.dtype)
    began = time.monotonic()
    written = _run(job, todo, options.processes, console)
    done = {d.name: d for d in [*finished, *(w.done for w in written)]}
    ordered = [done[file.name] for file in plan.files]
    companions = partial
    if plan.to is Kind.MCORE:
        companions = partial / COMPANIONS
        companions.mkdir(exist_ok=True)
        content = {"converted_from": str(plan.source.kind.value), "tensor_parallel": options.layout.tensor_parallel}
        torch.save({"content_metadata": content}, partial / COMMON)
        tensors = mcore_tensors(plan.shape, plan.dtype, plan.padded_vocab)
        write_index(partial, tensors.items(), (stored for d in ordered for stored in d.stored))
    else:
        hf_folder.write_index(partial, {f.name: f.specs for f in plan.files if isinstance(f, tasks.HfFile)})
    hf_folder.copy_companions(plan.hf, companions, plan.dtype)
    shutil.rmtree(partial / tasks.RECORDS)
    manifest.write(partial, {d.name: d.entry for d in ordered}, options.processes)
    if options.out.exists():
        options.out.rmdir()
    os.rename(partial, options.out)
    return Outcome(
        plan=plan,
        seconds=time.monotonic() - began,
        written_bytes=sum(file.bytes for file in todo),
        reused=len(finished),
        base_bytes=max((w.base_bytes for w in written), default=0),
        peak_bytes=max((w.peak_bytes for w in written), default=0),
    )


def _go_on(plan: Plan, partial: Path) -> list[tasks.Done]:
    """Files of an interrupted conversion of the same plan; a folder of another plan is replaced."""
    records = partial / tasks.RECORDS
    try:
        same = json.loads((records / _PLAN).read_text())["key"] == plan.key
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        records.mkdir(parents=True)
        (records / _PLAN).write_text(json.dumps({"key": plan.key}))
        return []
    found = (tasks.read_record(records / f"{file.name}.json") for file in plan.files)
    return [
        done
        for done in found
        if done is not None
        and (partial / done.name).is_file()
        and (partial / done.name).stat().st_size == done.entry.bytes
    ]


def _run(
    job: tasks.Job, todo: Sequence[tasks.McoreFile | tasks.HfFile], processes: int, console: Console
) -> list[tasks.Written]:
    """Write all files; the largest first, so that processes end together."""
    # Forked, with this process's imports: those of torch take a new process as long as writing gigabytes. It has no
    # threads yet, and the children compute with one.
    context = multiprocessing.get_context("fork")
    progress = context.Value("q", 0)
    order = sorted(todo, key=lambda file: -file.bytes)
    workers = min(processes, len(order))
    if workers > 1:
        pool: concurrent.futures.Executor = concurrent.futures.ProcessPoolExecutor(
            workers, context, tasks.start_process, (progress,)
        )
    else:
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=tasks.start, initargs=(progress,))
    with pool:
        futures = [pool.submit(tasks.write_file, job, file) for file in order]
        try:
            with bar(console) as shown:
                task = shown.add_task("converting", total=sum(file.bytes for file in order))
                _wait(futures, lambda: shown.update(task, completed=progress.value))
        except BrokenProcessPool as e:
            raise RunError(
                f"{job.out}: a process was killed (out of memory?); the same command again uses the finished files"
            ) from e
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures]


def _wait(futures: Sequence[concurrent.futures.Future[tasks.Written]], show: Callable[[], None]) -> None:
    left = set(futures)
    while left:
        done, left = concurrent.futures.wait(left, _POLL_S, concurrent.futures.FIRST_EXCEPTION)
        for future in done:
            future.result()
        show()


def say(console: Console, name: str, text: str) -> None:
    """One line of the report: what, and the facts."""
    console.print(f"{name:>15}  {text}", soft_wrap=True, highlight=False, markup=False)


def bar(console: Console) -> Progress:
    """A progress bar over bytes."""
    return Progress(
        TextColumn("{task.description:>15}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
