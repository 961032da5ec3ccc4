"""The command line of `stare-megatron study`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

ABOUT = "run several variants over seeds and compare them; called again, it continues where it stopped"
EXAMPLES = (
    "study study.toml --dry-run",
    "study study.toml --form quick",
    "study study.toml --only 'stare*' --jobs 2",
)


def add_study(parser: argparse.ArgumentParser) -> None:
    """The options of `study`."""
    add = parser.add_argument
    add("study", type=paths.argument, help="TOML file; `stare-megatron docs studies` describes it")
    add("--form", default="", metavar="NAME", help="a smaller form of the study, e.g. quick")
    add("--dir", type=paths.argument, metavar="FOLDER", help="where run folders go (default: the study's dir)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="only runs whose name matches, e.g. 'stare*'; given again, also those that match another",
    )
    add("--jobs", type=int, default=0, metavar="N", help="runs at a time (default: as many as fit)")
    add("--dry-run", action="store_true", help="list the runs and their settings, run nothing")
