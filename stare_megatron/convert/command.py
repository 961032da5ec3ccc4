"""What `stare-megatron convert` and `inspect` do (and the tools of these names), and what they say."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.filesize import decimal

from stare_megatron.convert import inspection, run
from stare_megatron.convert.plan import ParallelLayout
from stare_megatron.convert.run import Options, Outcome, bar, check_source, say
from stare_megatron.convert.source import Kind, Source, resolve
from stare_megatron.convert.verify import LOGITS_TOLERANCE, compare_logits, compare_tensors, logits_fit, sides
from stare_megatron.errors import RunError
from stare_megatron.host import manifest
from stare_megatron.models.hf_folder import dtype_name

_KINDS = {"hf": Kind.HF, "mcore": Kind.MCORE}  # of --to
_MIB = 2**20


def convert(args: argparse.Namespace) -> int:
    """Convert and, where asked, verify.

    Raises:
        UserError, RunError: as `run.convert` and `verify` say.
    """
    console = Console(stderr=False, quiet=args.quiet)
    outcome = run.convert(
        Options(
            source=args.source,
            out=args.out,
            hf=args.hf,
            to=_KINDS[args.to] if args.to else None,
            dtype=args.dtype,
            layout=ParallelLayout(
                args.tensor_parallel, args.pipeline_parallel, args.virtual_pipeline, args.expert_parallel
            ),
            processes=args.processes,
            file_bytes=round(args.file_gb * 1e9),
            check=args.check,
        ),
        console,
    )
    for name, text in _report(outcome, args.processes):
        say(console, name, text)
    if args.verify:
        _verify(args, outcome, console)
    say(console, "done", str(args.out))
    return 0


def _report(outcome: Outcome, processes: int) -> list[tuple[str, str]]:
    if not outcome.written_bytes:
        return [("written", "nothing: every file was there")]
    speed = f"{outcome.written_bytes / 1e6 / outcome.seconds:,.0f} MB/s, {processes} process(es)"
    peak, base = (f"{n / _MIB:,.0f}" for n in (outcome.peak_bytes, outcome.base_bytes))
    return [
        ("written", f"{decimal(outcome.written_bytes)} in {outcome.seconds:,.1f} s, {speed}"),
        ("peak memory", f"{peak} MiB resident a process, {base} of it before the first tensor"),
    ]


def _verify(args: argparse.Namespace, outcome: Outcome, console: Console) -> None:
    """Raises: RunError: the two checkpoints are not the same model."""
    hf, mcore = sides(args.source, args.out, args.hf)
    plan = outcome.plan
    with bar(console) as shown:
        task = shown.add_task("verifying", total=plan.bytes)
        same = compare_tensors(hf, mcore, plan.shape, plan.dtype, lambda n: shown.advance(task, n))
    say(console, "verified", f"{same.tensors:,} tensors equal bit for bit, XXH3 {same.checksum}")
    if args.verify == "tensors":
        return
    if args.verify == "auto" and not logits_fit(plan.parameters):
        say(console, "verified", "logits not compared: two models in float32 do not fit into the free memory")
        return
    # transformers reads the configuration beside the weights.
    found = compare_logits(hf, mcore)
    text = f"{found.difference:.1e} on logits up to {found.largest:.1f} over {found.tokens} tokens (float32)"
    if not found.same:
        raise RunError(f"{args.out}: Megatron-Core and transformers differ by {text}, more than {LOGITS_TOLERANCE}")
    say(console, "verified", f"Megatron-Core's logits are transformers', largest difference {text}")


def inspect(args: argparse.Namespace) -> int:
    """Show what a checkpoint contains or how two differ; 1 when they do.

    Raises:
        UserError: no such checkpoint, or a damaged one.
    """
    console = Console()
    source = resolve(args.checkpoint, args.hf)
    if args.other is not None:
        return _differ(source, resolve(args.other, args.hf), args, console)
    if args.write_manifest:
        entries = manifest.write(source.root)
        say(console, "manifest", f"{len(entries)} files hashed into {source.root / manifest.NAME}")
    if args.verify:
        check_source(source, console, 2)
    held = inspection.tensors(source, optimizer=args.optimizer)
    infos = held.infos
    for name, text in [*inspection.facts(source), *inspection.summary(infos)]:
        say(console, name, text)
    if args.tensors or args.checksums:
        for name, info in infos.items():
            line = f"{dtype_name(info.dtype):<9} {'x'.join(map(str, info.shape)):<22} {name}"
            seal = inspection.checksum(held, name, info) + "  " if args.checksums else ""
            console.print(seal + line, soft_wrap=True, highlight=False, markup=False)
    return 0


def _differ(one: Source, other: Source, args: argparse.Namespace, console: Console) -> int:
    left, right = inspection.comparable(one, other, optimizer=args.optimizer)
    infos = left.infos
    found = 0
    with bar(console) as shown:
        task = shown.add_task("comparing", total=sum(info.bytes for info in infos.values()))
        for difference in inspection.differences(left, right, lambda n: shown.advance(task, n)):
            found += 1
            largest = "" if difference.largest is None else f", largest difference {difference.largest:.3g}"
            say(console, "differs", f"{difference.name}: {difference.what}{largest}")
    say(console, "same" if not found else "different", f"{found} of {len(infos):,} tensors differ")
    return 1 if found else 0
