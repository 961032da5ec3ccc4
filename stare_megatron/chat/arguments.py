"""The command line of `stare-megatron sample`."""

from __future__ import annotations

import argparse

from stare_megatron.host import paths

ABOUT = "ask a policy: print what it samples for a prompt, or talk with it line by line"
EXAMPLES = (
    'sample runs/demo "3 8 4 11 :" --samples 4',
    "sample runs/demo",
    'sample Qwen2.5-0.5B-Instruct "Why is the sky blue?" --temperature 0',
)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""
    add = parser.add_argument
    policy = "run folder (what it exported, else its newest checkpoint), a checkpoint, or a Hugging Face folder"
    add("policy", type=paths.argument, metavar="POLICY", help=policy)
    add("prompt", nargs="?", default="", help="without one, each line that is typed is a prompt; Ctrl-D ends")
    add("--samples", type=int, default=1, metavar="N", help="responses to the prompt (default: 1)")
    add("--max-tokens", type=int, default=512, metavar="N", help="longest response (default: 512)")
    add("--temperature", type=float, default=1.0, help="0: the likeliest token each time (default: 1)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1)")
    add("--seed", type=int, default=0)
    form = parser.add_mutually_exclusive_group()
    chat = "write prompts out by the chat template (default: as the run did; for a folder, where it has one)"
    form.add_argument("--chat", action="store_true", help=chat)
    form.add_argument("--raw", action="store_true", help="give prompts to the model as they are")
    add("--system", default="", metavar="TEXT", help="system message, with a chat template")
