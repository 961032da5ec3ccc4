"""Paths as a user writes them: in the configuration, on the command line, in Python."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from stare_megatron.errors import UserError

_LONGEST, _LONGEST_NAME = 4095, 255  # bytes, Linux
_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")  # a message that names the path is one line
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def absolute(path: str | Path) -> Path:
    """`~` and `$VARIABLE` expanded; a relative path starts at the current directory of this process, wherever it is
    read later.

    Raises:
        ValueError: empty, too long, with a control character, or of a variable or user that is not defined.
    """
    text = os.fspath(path)
    if text != text.strip() or not text or _CONTROL.search(text):
        raise ValueError("must be a path: not empty, without spaces at its ends, without control characters")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if found := _VARIABLE.search(expanded):
        raise ValueError(f"the environment variable {found[0]} is not defined; set it, or write the path itself")
    if expanded.startswith("~"):
        raise ValueError(f"there is no user {expanded.partition('/')[0]!r}; a file of that name is ./{text}")
    made = os.path.abspath(expanded)  # links are left as they are called
    if len(os.fsencode(made)) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_NAME for part in made.split("/")):
        raise ValueError("is longer than a path can be")
    return Path(made)


def argument(text: str) -> Path:
    """`absolute`, for argparse."""
    try:
        return absolute(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} {e}") from e


def given(path: str | Path, name: str) -> Path:
    """`absolute`, of the argument `name` of a function.

    Raises:
        UserError: in place of ValueError.
    """
    try:
        return absolute(path)
    except ValueError as e:
        raise UserError(f"{name} = {str(path)!r}: {e}") from e
