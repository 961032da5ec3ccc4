"""A process that compares answers: a JSON object a line in, a JSON object a line out (see `workers.py`)."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_SECONDS = 3  # math-verify's own time-outs: SIGALRM, which works here, on the main thread of a process of its own


def compare(answer: str, response: str) -> tuple[bool, str]:
    """Whether the response's answer equals the reference, and a note if not."""
    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    gold = parse(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}", kinds, parsing_timeout=_SECONDS)
    if not gold:
        return False, f"the reference answer {answer!r:.60} cannot be read"
    found = parse(response, kinds, parsing_timeout=_SECONDS)
    if not found:
        return False, "no answer"
    if verify(gold, found, timeout_seconds=_SECONDS):
        return True, ""
    return False, f"{str(found[-1])!r:.60}, want {answer!r:.60}"


def serve(requests: TextIO, replies: TextIO) -> None:
    replies.write("ready\n")
    replies.flush()
    for line in requests:
        request = json.loads(line)
        correct, note = compare(request["answer"], request["response"])
        replies.write(json.dumps({"correct": correct, "note": note}) + "\n")
        replies.flush()


if __name__ == "__main__":
    replies = sys.stdout
    sys.stdout = sys.stderr  # a print in a library must not end up among the replies
    serve(sys.stdin, replies)
