"""Write prompts of a generated task as JSONL, after those already in the file with --append.

python tools/make_prompts.py --task order_free_sum_large --count 1000 --out prompts.jsonl
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stare_megatron import tasks
from stare_megatron.errors import UserError
from stare_megatron.tasks.folder import write_prompts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help=f"one of: {', '.join(sorted(tasks.TASKS))}")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--split", choices=("train", "eval", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0, help="which prompts of the split, and their order")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--append", action="store_true", help="keep what the file contains")
    args = parser.parse_args(argv)
    try:
        task = tasks.get(args.task)
        made = task.prompts(args.split, args.count, args.seed)
        write_prompts(args.out, task.name, made, append=args.append)
    except (UserError, OSError) as e:
        print(f"make_prompts: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(made)} prompts of {task.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
