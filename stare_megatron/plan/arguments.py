"""The command line of `stare-megatron plan`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

ABOUT = "what a run takes of each GPU and how long a step is, from its settings and config.json alone"
EXAMPLES = (
    "plan run.toml",
    "plan run.toml trainer.world_size=32 trainer.tensor_parallel=8 --gpu h200 --nodes 4",
    "plan run.toml --search",
    "plan sft.toml",
    "plan --calibrate gpu.json",
)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`."""
    add = parser.add_argument
    add(
        "settings",
        nargs="*",
        metavar="run.toml key.sub=value",
        help="TOML file of a run of train or sft, and overrides",
    )
    add("--gpu", default="h100", metavar="NAME", help="a100, h100, h200, h20 or b200 (default: h100)")
    add("--nodes", type=int, default=0, metavar="N", help="nodes there are (default: as many as the run takes)")
    layers = "whose layers the ranks run: transformer_engine (default), or Megatron-Core's own"
    add("--layers", choices=("transformer_engine", "local"), default="transformer_engine", help=layers)
    response = "mean response (default: half of the longest); of sft: what is learned (3/8 of the longest)"
    add("--response", type=float, default=0.0, metavar="TOKENS", help=response)
    prompt = "mean prompt (default: a quarter of the longest); of sft: what is not learned (1/8 of the longest)"
    add("--prompt", type=float, default=0.0, metavar="TOKENS", help=prompt)
    add("--lengths", type=paths.argument, metavar="RUN", help="folder of a run whose lengths of responses to take")
    kept = "share of the groups that dynamic sampling keeps (default: 1)"
    add("--kept", type=float, default=1.0, metavar="SHARE", help=kept)
    add("--search", action="store_true", help="propose layouts of the same GPUs, fastest first")
    add("--json", action="store_true", help="print JSON")
    add("--constants", type=paths.argument, metavar="FILE", help="what --calibrate wrote")
    calibrate = "measure this machine's GPU in a few minutes, write its constants there, and plan nothing"
    add("--calibrate", type=paths.argument, metavar="FILE", help=calibrate)
