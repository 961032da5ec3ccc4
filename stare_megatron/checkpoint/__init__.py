"""Training checkpoints: one folder a step with the trainer's shards and the loop's state, and an atomic `latest`.

    checkpoints/step_000040/trainer/...     Megatron-Core distributed checkpoint, written by the ranks
    checkpoints/step_000040/loop.json       everything else a resumed run needs
    checkpoints/step_000040/ahead.npz       what was sampled or ordered ahead, where the run samples while it trains
    checkpoints/step_000040/settings.json   the configuration, and checksums of the model's configuration and tokenizer
    checkpoints/step_000040/manifest.json   sizes and checksums of all of these
    checkpoints/local/step_000040/...       as above, with links to files on the nodes' own disks (`checkpoint.local`)
    checkpoints/latest                      the name of the newest whole folder
    bank/step_000040-1f0c2a7e/...           finished groups that step 40 names and nobody has learned from (`bank.py`)
    checkpoints/left_step_000060/...        a later one of a branch that was left when the run went on from step 40

A folder is written under a temporary name and renamed when complete, so a folder with its final name is whole.
"""

from stare_megatron.checkpoint.ahead import Ahead, Outstanding
from stare_megatron.checkpoint.ahead import read as read_ahead
from stare_megatron.checkpoint.bank import Bank, Banked, shelf_name
from stare_megatron.checkpoint.local import Local, NodeDisks, home_of, is_local, newest, newest_first
from stare_megatron.checkpoint.local import drop as drop_local
from stare_megatron.checkpoint.saver import RankWriters, Saver
from stare_megatron.checkpoint.settings import Settings, check_settings, settings_of, with_date
from stare_megatron.checkpoint.state import LoopState, read
from stare_megatron.checkpoint.store import find, set_aside, verify

__all__ = [
    "Ahead",
    "Bank",
    "Banked",
    "Local",
    "LoopState",
    "NodeDisks",
    "Outstanding",
    "RankWriters",
    "Saver",
    "Settings",
    "check_settings",
    "drop_local",
    "find",
    "home_of",
    "is_local",
    "newest",
    "newest_first",
    "read",
    "read_ahead",
    "set_aside",
    "settings_of",
    "shelf_name",
    "verify",
    "with_date",
]
