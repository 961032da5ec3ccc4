"""Write few-shot prompts of a reasoning-gym data set as JSONL, for the reward `reasoning_gym`.

python tools/make_reasoning_prompts.py --dataset chain_sum --set max_terms=2 --count 512 --out a.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.tasks import reasoning
from stare_megatron.tasks.folder import write_prompts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a name of reasoning-gym's, e.g. chain_sum")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="a setting of the data set")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--shots", type=int, default=4, help="solved questions before the unsolved one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--without", type=Path, action="append", default=[], metavar="FILE", help="leave out all questions of this file"
    )
    parser.add_argument("--append", action="store_true", help="keep what the file contains")
    args = parser.parse_args(argv)
    try:
        settings = dict(_setting(item) for item in args.set)
        without = {question for path in args.without for question in _questions(path)}
        made = reasoning.prompts(args.dataset, settings, args.count, args.shots, args.seed, without)
        write_prompts(args.out, args.dataset, made, append=args.append)
    except (UserError, OSError) as e:
        print(f"make_reasoning_prompts: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(made)} prompts of {args.dataset}")
    return 0


def _questions(path: Path) -> set[str]:
    try:
        return {q for line in path.read_text().splitlines() for q in reasoning.questions(json.loads(line)["prompt"])}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not written by this tool: {e!r}") from e


def _setting(item: str) -> tuple[str, object]:
    key, _, value = item.partition("=")
    try:
        return key, json.loads(value)
    except ValueError as e:
        raise UserError(f"--set {item!r} is not KEY=JSON") from e


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
