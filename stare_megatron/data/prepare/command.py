"""`stare-megatron prepare-data`: from a published data set of mathematical problems to a prompt file."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from stare_megatron.data.prepare import retool
from stare_megatron.data.prepare.hub import Source, download
from stare_megatron.data.prepare.pipeline import prepare
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.prepare.settings import INSTRUCTION, Settings
from stare_megatron.data.prepare.types import Counts
from stare_megatron.data.rows import is_blank
from stare_megatron.errors import UserError
from stare_megatron.host import program


def run(args: argparse.Namespace, say: Callable[[str], None]) -> str:
    """Write the prompt file; returns what it holds. `say` is given a line about each fault on the way.

    Raises:
        UserError: options that contradict each other, and as `hub.download` and `pipeline.prepare`.
    """
    conversations = args.dataset == retool.SFT.name
    if conversations:
        _check_conversations(args)
    recipe, settings = retool.SFT if conversations else RECIPES[args.dataset], _settings(args)
    if args.file:
        source = Source("", tuple(args.file))
    else:
        source = download(recipe, args.hub or recipe.hub, args.revision, args.split or recipe.split)
    if conversations:
        counts = retool.prepare(source, settings, args.out, say)
    else:
        counts = prepare(recipe, source, settings, args.out, say)
    return f"{args.out}: {_told(counts)}"


def _check_conversations(args: argparse.Namespace) -> None:
    """Raises: UserError: an option that is for prompts, or no system message."""
    given = {"split": args.split, "against": args.against, "source": args.source}
    given["instruction"] = args.instruction not in (INSTRUCTION, "")
    for name in (name for name, value in given.items() if value):
        raise UserError(f"--{name} is for prompts, and {retool.SFT.name} has conversations; leave it out")
    if args.form != "chat" or not args.system:
        raise UserError(
            f"{retool.SFT.name} has conversations: give --form chat, and with --system the system message of the run "
            f"that follows; `{program.called()} example tool_use_7b/system.txt` prints one"
        )


def _settings(args: argparse.Namespace) -> Settings:
    if args.system and args.form != "chat":
        raise UserError("--system needs --form chat")
    if args.ngram < 1 or args.common < 2 or not 0 < args.overlap <= 1:
        raise UserError("--ngram must be at least 1, --common at least 2, --overlap above 0 and at most 1")
    for name in ("instruction", "system", "source"):
        text = str(vars(args)[name])
        if (text and is_blank(text)) or any("\ud800" <= c <= "\udfff" for c in text):  # bytes that are no UTF-8
            raise UserError(f"--{name} {text!r:.60}: want a text in UTF-8 that is not blank")
    given: dict[str, Any] = {field.name: vars(args)[field.name] for field in dataclasses.fields(Settings)}
    given["against"] = tuple(args.against)
    return Settings(**given)


def _told(counts: Counts) -> str:
    left_out = {
        "malformed": counts.malformed,
        "without an answer to check": counts.unsuitable,
        "repeated": counts.repeated,
        "with conflicting answers": counts.conflicting,
        "equal to a problem of --against": counts.same,
        "overlapping with one": counts.overlapping,
    }
    told = ", ".join(f"{count} {what}" for what, count in left_out.items() if count)
    return f"{counts.written} of {counts.rows} rows" + (f"; left out: {told}" if told else "")
