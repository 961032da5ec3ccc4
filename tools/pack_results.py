"""Copy what a comparison needs of run folders, small enough to commit: settings, starts, packed metrics, evaluations.

python tools/pack_results.py runs/entropy_band/* --out examples/entropy_band/results

Of long runs `--digits 6` takes half the room: values with so many significant digits.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from pathlib import Path

from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl

_KEPT = ("config.toml", "run.json", "eval.jsonl")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="folder to put a folder of each run into")
    parser.add_argument("--digits", type=int, help="significant digits of a value (default: all)")
    args = parser.parse_args(argv)
    try:
        for run in args.runs:
            print(pack(run, args.out / run.name, args.digits))
    except (UserError, OSError) as e:
        print(f"pack_results: {e}", file=sys.stderr)
        return 2
    return 0


def pack(run: Path, out: Path, digits: int | None = None) -> str:
    """Write the folder `out`, which `stare-megatron compare` reads as it reads `run`; says what was written. `digits`:
    significant ones of a value; None: all.

    Raises:
        UserError: `run` has no metrics, or damaged ones.
    """
    file = run / jsonl.FILE
    rows = jsonl.read(file)
    out.mkdir(parents=True, exist_ok=True)
    for name in _KEPT:
        if (run / name).is_file():
            shutil.copyfile(run / name, out / name)
    packed = out / f"{jsonl.FILE}.gz"
    text = file.read_bytes() if digits is None else "".join(_line(row, digits) for row in rows).encode()
    packed.write_bytes(gzip.compress(text, mtime=0))
    return f"{out}: {len(rows)} steps, {packed.stat().st_size / 1024:.0f} KiB of metrics"


def _line(row: jsonl.Row, digits: int) -> str:
    short = {name: int(value) if value.is_integer() else float(f"{value:.{digits}g}") for name, value in row.items()}
    return json.dumps(short) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
