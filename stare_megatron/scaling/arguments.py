"""The command line of `stare-megatron scale`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

ABOUT = "fit accuracy in compute by size and method, from finished runs or a study: curves, power laws, intervals"
EXAMPLES = (
    "scale runs/scaling_cpu --out report",
    "scale examples/scaling_cpu/study.toml --jobs 2",
    "scale runs/* --out report --axis tokens --skip 20 --json numbers.json",
)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """The options of `scale`."""
    add = parser.add_argument
    runs = "run folder, a folder of run folders, or one study file, whose runs are done first where they are not"
    add("runs", type=paths.argument, nargs="+", metavar="RUN", help=runs)
    out = "where scaling.html goes (default, of a study: beside its runs, NAME-scaling)"
    add("--out", type=paths.argument, metavar="FOLDER", help=out)
    axis = "what fits and tables are over: counted FLOPs, trained tokens, steps, or device hours (default: flops)"
    add("--axis", choices=("flops", "tokens", "steps", "hours"), default="flops", help=axis)
    add("--benchmark", default="", metavar="NAME", help="whose avg@k is the accuracy (default: the mean over all)")
    skip = "steps of the transient that fits leave out; say why before looking at the curves (default: 0)"
    add("--skip", type=int, default=0, metavar="N", help=skip)
    by = "further key that parts methods, or section ending in a dot, e.g. rollout.group_size; may be repeated"
    add("--by", action="append", default=[], metavar="KEY", help=by)
    add("--title", default="", help="title of the report")
    add("--json", type=paths.argument, metavar="FILE", help="write all numbers there")
    add("--form", default="", metavar="NAME", help="of a study: a smaller form of it")
    add(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="of a study: only runs whose name matches; given again, also those that match another",
    )
    add("--jobs", type=int, default=0, metavar="N", help="of a study: runs at a time (default: as many as fit)")
    add("--dry-run", action="store_true", help="of a study: list the runs and their settings, run nothing")
