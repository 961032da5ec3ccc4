"""Write prompts.jsonl: `python examples/your_own/make_prompts.py`. The same file every time."""

from __future__ import annotations

import json
from pathlib import Path

from stare_megatron import tasks

FILE = Path(__file__).with_name("prompts.jsonl")


def rows() -> list[dict[str, object]]:
    """The sums of the demo, with a column of our own: how far off an answer may be to get partial credit."""
    return [
        {"id": p.id, "prompt": p.text, "answer": p.answer, "tolerance": max(1, int(p.answer) // 10)}
        for p in tasks.get("order_free_sum").prompts("train", 256, seed=0)
    ]


if __name__ == "__main__":
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows()))
