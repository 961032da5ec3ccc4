"""Compare runs: `stare-megatron compare` without the installed command.

    python tools/compare_runs.py RUN... --out FOLDER

See docs/comparing_runs.md.
"""

from __future__ import annotations

import sys

from stare_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
