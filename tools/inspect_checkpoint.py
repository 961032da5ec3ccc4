"""Show what a checkpoint contains, or how two differ (exit code 1 when they do). The same as `stare-megatron inspect`.

python tools/inspect_checkpoint.py runs/NAME
python tools/inspect_checkpoint.py MODEL OTHER
"""

from __future__ import annotations

import sys

from stare_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
