"""The command line of `stare-megatron compare` and `watch`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths
from stare_megatron.host.pages import LOOPBACK

ABOUT = "compare runs side by side: one HTML report that needs no network, PNGs and the numbers"
EXAMPLES = ("compare runs/grpo runs/stare", "compare runs/* --out report --align tokens --smooth 10")
WATCH = "follow a run in a browser: its report, made again when there are new steps; safe beside the training"
WATCH_EXAMPLES = ("watch runs/demo", "watch runs/demo --port 9000", "watch runs/demo --once demo.html")
PORT = 8765


def add_compare(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    add = parser.add_argument
    add("runs", type=paths.argument, nargs="+", metavar="RUN", help="run folder, or a folder of run folders")
    where = "where report.html and png/ go (default: beside the first RUN, RUN-report)"
    add("--out", type=paths.argument, metavar="FOLDER", help=where)
    add("--align", choices=("step", "tokens", "time"), default="step", help="x axis (default: step)")
    add("--smooth", type=int, default=1, metavar="N", help="moving average over N steps (default: none)")
    add("--last", type=int, default=10, metavar="N", help="final values are means of the last N steps (default: 10)")
    add("--target", type=float, metavar="NATS", help="target entropy to draw for methods without one")
    add("--ignore", action="append", default=[], metavar="KEY", help="key that does not separate groups")
    add("--title", default="", help="title of the report")
    add("--samples", type=int, default=3, metavar="N", help="files of samples per run (default: 3)")
    add("--json", type=paths.argument, metavar="FILE", help="write the table's numbers there")
    add("--no-png", dest="png", action="store_false", help="the report only")
    add("--verbose", action="store_true", help="list every file that was written")


def add_watch(parser: argparse.ArgumentParser) -> None:
    """The options of `watch`."""
    add = parser.add_argument
    add("run", type=paths.argument, metavar="RUN", help="run folder")
    add("--port", type=int, metavar="N", help=f"port of the page (default: {PORT}, or a free one where it is taken)")
    add("--host", default=LOOPBACK, help=f"address to listen on; 0.0.0.0: to anyone (default: {LOOPBACK})")
    add("--once", type=paths.argument, metavar="OUT", help="write the report to this folder or .html file and end")
