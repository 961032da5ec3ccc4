"""Turn a published data set of mathematical problems into a prompt file: `stare-megatron prepare-data`.

python tools/prepare_data.py aime24 --out data/aime24.jsonl
"""

from __future__ import annotations

import sys

from stare_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare-data", *sys.argv[1:]]))
