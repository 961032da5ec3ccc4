"""Worked answers of the task for `stare-megatron sft`, in the form that `prepare-data retool-sft` writes: a prompt, and
parts of which what the interpreter says is not learned.

python examples/tool_use_cpu/make_worked.py --out .cache/tool_use/worked.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stare_megatron.tasks.base import TaskPrompt, parts_of
from stare_megatron.tasks.tool_arithmetic import TASK


def rows(prompts: list[TaskPrompt], count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """`count` worked answers to prompts drawn at random, each in a way drawn at random."""
    for _ in range(count):
        prompt = rng.choice(prompts)
        pairs = parts_of(TASK, TASK.trace(prompt, rng))
        parts = [{"text": text, "learn": i == 0} for pair in pairs for i, text in enumerate(pair) if text]
        yield {"prompt": prompt.text, "parts": parts}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the prompts, as of make_tiny_model (default: 1)")
    parser.add_argument("--prompts", type=int, default=4096, help="different ones (default: 4096)")
    parser.add_argument("--count", type=int, default=41_600, help="worked answers (default: 41600, 650 batches of 64)")
    args = parser.parse_args(argv)
    prompts = TASK.prompts("train", args.prompts, args.seed)
    made = rows(prompts, args.count, random.Random(args.seed))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in made))
    print(f"{args.out}: {args.count:,} worked answers to {args.prompts:,} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
