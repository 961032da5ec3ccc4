"""The arguments of `stare-megatron convert` and `inspect` and of the tools of these names. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os

from stare_megatron.host import paths

_CHECKPOINT = "folder of a checkpoint (either kind), of a training checkpoint, or of a run (its newest)"
_LAYOUT = (
    "The layout a new Megatron-Core checkpoint is meant for: checked against the model, and tensors are cut so that "
    "each rank reads only its own. Any other layout loads it too; a Megatron-Core source may have been saved at any."
)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """What `command.convert` reads."""
    add = parser.add_argument
    add("source", type=paths.argument, help=_CHECKPOINT)
    add("out", type=paths.argument, help="folder to make; it appears complete or not at all")
    add("--to", choices=["hf", "mcore"], help="kind of the new checkpoint (default: the other kind)")
    add(
        "--hf",
        type=paths.argument,
        metavar="FOLDER",
        help="with config.json and tokenizer, where the source leads to none",
    )
    dtypes = ["keep", "float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, default="keep", help="of the new weights (default: as they are)")
    add("--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="files written at a time")
    add("--file-gb", type=float, default=4.0, metavar="GB", help="size of a file, at most (default: 4)")
    add(
        "--verify",
        nargs="?",
        const="auto",
        choices=["auto", "tensors", "logits"],
        help="read both sides again and compare every tensor; `auto` (where memory allows) and `logits` also compare "
        "the logits of Megatron-Core and transformers",
    )
    add("--no-check", dest="check", action="store_false", help="do not compare the source with its manifest first")
    add("--quiet", action="store_true", help="say nothing but errors")
    layout = parser.add_argument_group("layout", _LAYOUT)
    for name in ("--tensor-parallel", "--pipeline-parallel", "--virtual-pipeline", "--expert-parallel"):
        layout.add_argument(name, type=positive, default=1, metavar="N")


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """What `command.inspect` reads."""
    add = parser.add_argument
    add("checkpoint", type=paths.argument, help=_CHECKPOINT)
    add("other", type=paths.argument, nargs="?", help="a second one: show how they differ (exit code 1 when they do)")
    add(
        "--hf",
        type=paths.argument,
        metavar="FOLDER",
        help="Hugging Face folder with config.json, where it cannot be found",
    )
    add("--tensors", action="store_true", help="list every tensor")
    add("--checksums", action="store_true", help="list every tensor with the XXH3 of its bytes")
    add("--optimizer", action="store_true", help="the optimizer's tensors of a training checkpoint as well")
    add("--verify", action="store_true", help="compare every file with the manifest")
    add("--write-manifest", action="store_true", help="write checksums of all files, to be verified later")


def positive(text: str) -> int:
    """Raises: ValueError: not a positive integer."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value
