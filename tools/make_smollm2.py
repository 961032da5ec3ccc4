"""Write SmolLM2-135M-Instruct as a Hugging Face checkpoint, with few-shot arithmetic prompts.

python tools/make_smollm2.py --out .cache/smollm2 --pad-heads
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils import logging

from stare_megatron.errors import UserError
from stare_megatron.tasks.smollm2 import make_smollm2


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make: model/, train.jsonl, eval.jsonl")
    parser.add_argument(
        "--pad-heads",
        action="store_true",
        help="12 heads and 4 KV heads instead of 9 and 3, for tensor parallel 2 or 4",
    )
    parser.add_argument("--train-prompts", type=int, default=2048)
    parser.add_argument("--eval-prompts", type=int, default=256)
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    try:
        reused = make_smollm2(
            args.out, padded=args.pad_heads, train_prompts=args.train_prompts, eval_prompts=args.eval_prompts
        )
    except UserError as e:
        print(f"make_smollm2: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: SmolLM2-135M-Instruct and arithmetic prompts, {'reused' if reused else 'made'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
