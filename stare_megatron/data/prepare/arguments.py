"""The command line of `stare-megatron prepare-data`."""

from __future__ import annotations

import argparse

from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.retool import SFT
from stare_megatron.data.prepare.settings import INSTRUCTION
from stare_megatron.host import paths

ABOUT = (
    "turn a published data set of mathematical problems into a prompt file, from the Hugging Face hub or --file; "
    "`stare-megatron docs data` describes data sets and steps"
)
EXAMPLES = (
    "prepare-data aime24 --out data/aime24.jsonl",
    "prepare-data gsm8k --file gsm8k_train.jsonl --out data/gsm8k.jsonl",
    "prepare-data dapo-math-17k --out data/dapo.jsonl --against data/aime24.jsonl data/math500.jsonl",
)


def add_prepare_data(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare-data`."""
    add = parser.add_argument
    names = (*RECIPES, SFT.name)
    what = f"one of: {', '.join(names)}; the last is of conversations, for `sft`"
    add("dataset", choices=names, metavar="DATASET", help=what)
    add("--out", type=paths.argument, required=True, metavar="FILE", help="prompt file to write, JSONL")
    add("--file", type=paths.argument, nargs="+", help="published files, instead of the hub's")
    add("--hub", metavar="REPOSITORY", help="repository on the hub (default: the data set's)")
    add("--revision", default="main", help="branch, tag or commit there")
    add("--split", help="split, where files are named by it (default: the data set's)")
    add("--form", choices=("text", "chat"), default="text", help="prompts as text or chat messages")
    add("--instruction", default=INSTRUCTION, help=f"line after each problem (default: {INSTRUCTION!r})")
    add("--system", default="", help="system message, with --form chat")
    add("--source", default="", help="the rows' source (default: the data set's name)")
    add(
        "--against",
        type=paths.argument,
        nargs="+",
        default=[],
        metavar="FILE",
        help="prepared files to keep out of this one",
    )
    add("--ngram", type=int, default=13, help="words in an n-gram")
    add("--overlap", type=float, default=0.5, help="fraction of n-grams from which a problem is left out")
    phrases = "n-grams of this many problems of --against are phrases and do not count"
    add("--common", type=int, default=5, help=phrases)
    conflicts = "a problem with several answers: drop it, or keep the first"
    add("--conflicts", choices=("drop", "first"), default="drop", help=conflicts)
    add("--skip-malformed", action="store_true", help="list malformed rows in a file and go on")
