"""Make and warm up a tiny Qwen2-architecture checkpoint and its task's prompts, on a CPU.

python tools/make_tiny_model.py --out .cache/demo
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stare_megatron import tasks
from stare_megatron.errors import RunError, UserError

if TYPE_CHECKING:
    from stare_megatron.tasks.tiny_model import TinyModelSettings


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to make: model/, train.jsonl, eval.jsonl, test.jsonl"
    )
    parser.add_argument("--task", default="order_free_sum", help=f"one of: {', '.join(sorted(tasks.TASKS))}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2, help="hidden / heads is the head size; vLLM's CPU build: >= 32")
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--mlp", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop-accuracy", type=float, help="sampled accuracy that ends the warm-up; default: the task's"
    )
    parser.add_argument("--random", action="store_true", help="no warm-up: random weights")
    parser.add_argument("--train-prompts", type=int, default=4096)
    parser.add_argument("--eval-prompts", type=int, default=300, help="in each of eval.jsonl, test.jsonl")
    args = parser.parse_args(argv)
    try:
        settings = dataclasses.replace(
            _settings(args), hidden=args.hidden, heads=args.heads, kv_heads=args.kv_heads, mlp=args.mlp
        )
        from transformers.utils import logging

        from stare_megatron.tasks.make import make

        logging.disable_progress_bar()
        made = make(settings, args.out, args.train_prompts, args.eval_prompts)
    except UserError as e:
        print(f"make_tiny_model: {e}", file=sys.stderr)
        return 2
    except RunError as e:
        print(f"make_tiny_model: {e}", file=sys.stderr)
        return 1
    m, w = made.measured, made.warmed_up
    how = "reused" if made.reused else f"made: {w.batches} batches of {settings.batch_size} in {w.seconds:.0f} s"
    print(f"{made.folder}: {settings.task}, {settings.layers} layers, {made.parameters:,} parameters, {how}")
    print(
        f"held out ({m.prompts} prompts x {m.samples}, temperature 1): accuracy {m.accuracy:.3f}, greedy "
        f"{m.greedy:.3f}, groups with right and wrong {m.mixed:.2f}, entropy {m.entropy:.3f} nats"
    )
    return 0


def _settings(args: argparse.Namespace) -> TinyModelSettings:
    from stare_megatron.tasks.tiny_model import default_settings

    settings = default_settings(args.task, args.layers, args.seed)
    if args.random:
        settings = dataclasses.replace(settings, max_batches=0)
    if args.stop_accuracy is not None:
        settings = dataclasses.replace(settings, stop_accuracy=args.stop_accuracy)
    return settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
