"""`stare-megatron make-tiny-model`: a warmed-up tiny model and its task's prompts."""

from __future__ import annotations

import argparse
import dataclasses

from transformers.utils import logging

from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings


def run(args: argparse.Namespace) -> str:
    """Make the folder, or reuse it; returns what it is and what was measured.

    Raises:
        UserError, RunError: as `tasks.make.make`.
    """
    settings = default_settings(args.task, args.layers, args.seed)
    settings = dataclasses.replace(
        settings,
        hidden=args.hidden,
        heads=args.heads,
        kv_heads=args.kv_heads,
        mlp=args.mlp,
        max_batches=0 if args.random else settings.max_batches,
        stop_accuracy=settings.stop_accuracy if args.stop_accuracy is None else args.stop_accuracy,
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
