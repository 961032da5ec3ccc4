"""Turn a published data set of mathematical problems into a prompt file.

    python tools/prepare_data.py aime24 --out data/aime24.jsonl
    python tools/prepare_data.py gsm8k --file gsm8k_train.jsonl --out data/gsm8k.jsonl
    python tools/prepare_data.py dapo-math-17k --out data/dapo.jsonl --against data/aime24.jsonl data/math500.jsonl

Without --file the published files are fetched from the Hugging Face hub. Beside OUT: OUT.manifest.json (checksums,
counts, settings), OUT.removed.jsonl (what was left out, and why), OUT.malformed.jsonl (with --skip-malformed).
docs/data.md describes the data sets and the steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stare_megatron.data.prepare.hub import Source, download
from stare_megatron.data.prepare.pipeline import prepare
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.settings import INSTRUCTION, Settings
from stare_megatron.data.prepare.types import Counts
from stare_megatron.errors import UserError


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    recipe = RECIPES[args.dataset]
    try:
        settings = _settings(args)
        if args.file:
            source = Source("", tuple(args.file))
        else:
            source = download(recipe, args.hub or recipe.hub, args.revision, args.split or recipe.split)
        counts = prepare(recipe, source, settings, args.out, lambda line: print(line, file=sys.stderr))
    except UserError as e:
        print(f"prepare_data: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {_told(counts)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=RECIPES, metavar="DATASET", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, required=True, help="prompt file to write, JSONL")
    parser.add_argument("--file", type=Path, nargs="+", help="published files, instead of the hub's")
    parser.add_argument("--hub", help="repository on the hub; default: the data set's")
    parser.add_argument("--revision", default="main", help="branch, tag or commit there")
    parser.add_argument("--split", help="split, where files are named by it; default: the data set's")
    parser.add_argument("--form", choices=("text", "chat"), default="text", help="prompts as text or chat messages")
    parser.add_argument("--instruction", default=INSTRUCTION, help=f"line after each problem; default: {INSTRUCTION!r}")
    parser.add_argument("--system", default="", help="system message, with --form chat")
    parser.add_argument("--source", default="", help="the rows' source; default: the data set's name")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="prepared files to keep out of this one")
    parser.add_argument("--ngram", type=int, default=13, help="words in an n-gram")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of n-grams from which a problem is left out")
    parser.add_argument(
        "--common", type=int, default=5, help="n-grams of this many problems of --against are phrases and do not count"
    )
    parser.add_argument(
        "--conflicts", choices=("drop", "first"), default="drop", help="a problem with several answers: drop, or first"
    )
    parser.add_argument("--skip-malformed", action="store_true", help="list malformed rows in a file and go on")
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    if args.system and args.form != "chat":
        raise UserError("--system needs --form chat")
    if args.ngram < 1 or args.common < 2 or not 0 < args.overlap <= 1:
        raise UserError("--ngram must be at least 1, --common at least 2, --overlap above 0 and at most 1")
    return Settings(
        form=args.form,
        instruction=args.instruction,
        system=args.system,
        source=args.source,
        against=tuple(args.against),
        ngram=args.ngram,
        overlap=args.overlap,
        common=args.common,
        conflicts=args.conflicts,
        skip_malformed=args.skip_malformed,
    )


def _told(counts: Counts) -> str:
    left_out = {
        "malformed": counts.malformed,
        "repeated": counts.repeated,
        "with conflicting answers": counts.conflicting,
        "equal to a problem of --against": counts.same,
        "overlapping with one": counts.overlapping,
    }
    told = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    return f"{counts.written} of {counts.rows} rows" + (f"; left out: {told}" if told else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
