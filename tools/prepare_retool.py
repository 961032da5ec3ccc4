"""Turn ReTool's published cold-start data into conversations for supervised training, tool output marked.

    python tools/prepare_retool.py --file ReTool-SFT/*.parquet --out data/retool_sft.jsonl

A line of OUT: {"messages": [system, user, assistant], "parts": [{"text": ..., "learn": true or false}, ...]}. Train
on the parts with `learn` true. Malformed rows are reported with file, row and field; nothing is written with any,
unless --skip-malformed. docs/data.md says more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from stare_megatron.data.prepare.read import read
from stare_megatron.data.prepare.retool import conversation
from stare_megatron.data.prepare.types import Malformed, MalformedField
from stare_megatron.errors import UserError
from stare_megatron.host.files import write_atomic


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, nargs="+", required=True, help="published files")
    parser.add_argument("--system", type=Path, default=SYSTEM, help="file with the system message")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--skip-malformed", action="store_true", help="go on without malformed rows")
    args = parser.parse_args(argv)
    try:
        lines, broken = _convert(args.file, args.system.read_text().strip())
        for line in broken:
            print(line, file=sys.stderr)
        if broken and not args.skip_malformed:
            raise UserError(f"{len(broken)} malformed rows; fix them or use --skip-malformed")
        if not lines:
            raise UserError("no rows")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out, "".join(lines))
    except (UserError, OSError, UnicodeError) as e:
        print(f"prepare_retool: {e}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(lines)} conversations" + (f"; left out: {len(broken)} malformed" if broken else ""))
    return 0


SYSTEM = Path(__file__).resolve().parents[1] / "examples/tool_use_7b/system.txt"


def _convert(files: list[Path], system: str) -> tuple[list[str], list[str]]:
    """Lines to write, and a line on each malformed row."""
    lines: list[str] = []
    broken: list[str] = []
    for path in files:
        for row in read(path):
            if isinstance(row, Malformed):
                broken.append(row.line())
                continue
            try:
                lines.append(json.dumps(conversation(row, system), ensure_ascii=False) + "\n")
            except MalformedField as e:
                broken.append(Malformed(row.place, e.field, str(e), "").line())
    return lines, broken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
