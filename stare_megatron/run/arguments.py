"""The command lines of `stare-megatron train`, `sft` and `eval`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

TRAIN = "train a policy"
TRAIN_EXAMPLES = (
    "train run.toml",
    "train run.toml run.name=wide rollout.group_size=8",
    "train run.toml run.resume=auto",
)
SFT = "teach a model conversations, before `train`: supervised, on the trainer's ranks alone"
SFT_EXAMPLES = ("sft sft.toml", "sft sft.toml sft.epochs=2 trainer.optimizer.lr=1e-5", "sft sft.toml run.resume=auto")
EVAL = "evaluate a policy on the held-out prompts of eval.benchmarks: avg@k and pass@k"
EVAL_EXAMPLES = ("eval run.toml --model runs/demo", "eval run.toml eval.benchmarks=aime24.jsonl eval.samples=32")


def add_train(parser: argparse.ArgumentParser) -> None:
    """The options of `train` and of `sft`."""
    add = parser.add_argument
    add("config", type=paths.argument, help="TOML file; `stare-megatron config` explains its keys")
    _add_overrides(parser)
    add("--print-config", action="store_true", help="print the resolved configuration, every key in use, and exit")
    add("--quiet", action="store_true", help="one line per step instead of the live display")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """The options of `eval`."""
    add = parser.add_argument
    add("config", type=paths.argument, help="TOML file of a run")
    _add_overrides(parser)
    policy = "Hugging Face folder, training checkpoint or run folder (default: the file's model.path)"
    add("--model", type=paths.argument, metavar="FOLDER", help=policy)
    where = "new folder for the results (default: RUN.DIR/NAME-eval, with the name of what is evaluated)"
    add("--out", type=paths.argument, metavar="FOLDER", help=where)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="override a key of the file")
