"""`stare-megatron make-tiny-model`: a warmed-up tiny model and its task's prompts."""

from __future__ import annotations

import argparse
import dataclasses

from transformers.utils import logging

from stare_megatron.errors import UserError
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings


def run(args: argparse.Namespace) -> str:
    """Make the folder, or reuse it; returns what it is and what was measured.

    Raises:
        UserError: options that exclude each other or are out of range; and as `tasks.make.make`. RunError: as there.
    """
    _check(args)
    settings = default_settings(args.task, args.layers, args.seed)
    settings = dataclasses.replace(
        settings,
        hidden=args.hidden,
        heads=args.heads,
        kv_heads=args.kv_heads,
        mlp=args.mlp,
        max_batches=0 if args.random else settings.max_batches if args.batches is None else args.batches,
        lr=settings.lr if args.lr is None else args.lr,
        stop_accuracy=_stop_accuracy(args, settings.stop_accuracy),
    )
    logging.disable_progress_bar()
    made = make(settings, args.out, args.train_prompts, args.eval_prompts)
    m, w = made.measured, made.warmed_up
    how = "reused" if made.reused else f"made: {w.batches} batches of {settings.batch_size} in {w.seconds:.0f} s"
    return (
        f"{made.folder}: {settings.task}, {settings.layers} layers, {made.parameters:,} parameters, {how}\n"
        f"held out ({m.prompts} prompts x {m.samples}, temperature 1): accuracy {m.accuracy:.3f}, greedy "
        f"{m.greedy:.3f}, groups with right and wrong {m.mixed:.2f}, entropy {m.entropy:.3f} nats"
    )


def _check(args: argparse.Namespace) -> None:
    if args.batches is not None and (args.random or args.stop_accuracy is not None):
        raise UserError("--batches is the whole warm-up: leave out --random and --stop-accuracy")
    if args.batches is not None and args.batches < 1:
        raise UserError(f"--batches {args.batches}: at least 1; --random leaves the weights random")
    if args.lr is not None and not 0 < args.lr <= 1:
        raise UserError(f"--lr {args.lr}: above 0, at most 1")


def _stop_accuracy(args: argparse.Namespace, default: float | None) -> float | None:
    if args.batches is not None:
        return None
    return default if args.stop_accuracy is None else args.stop_accuracy
