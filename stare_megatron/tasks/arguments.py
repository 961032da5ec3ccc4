"""The command line of `stare-megatron make-tiny-model`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

ABOUT = "make and warm up a tiny checkpoint and its task's prompts, on a CPU"
EXAMPLE = "make-tiny-model --out .cache/demo"


def add_make_tiny_model(parser: argparse.ArgumentParser) -> None:
    """The options of `make-tiny-model`."""
    add = parser.add_argument
    files = "folder to make: model/, train.jsonl, eval.jsonl, test.jsonl"
    add("--out", type=paths.argument, required=True, metavar="FOLDER", help=files)
    add("--task", default="order_free_sum", help="generated task (default: order_free_sum); a wrong name lists them")
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=64)
    add("--heads", type=int, default=2, help="hidden / heads is the head size; vLLM's CPU build: >= 32")
    add("--kv-heads", type=int, default=2)
    add("--mlp", type=int, default=192)
    add("--seed", type=int, default=0)
    add("--stop-accuracy", type=float, help="sampled accuracy that ends the warm-up (default: the task's)")
    add("--batches", type=int, help="exactly so many batches of warm-up, whatever the accuracy after them")
    add("--lr", type=float, help="learning rate of the warm-up (default: the task's)")
    add("--random", action="store_true", help="no warm-up: random weights")
    add("--train-prompts", type=int, default=4096)
    add("--eval-prompts", type=int, default=300, help="in each of eval.jsonl, test.jsonl")
