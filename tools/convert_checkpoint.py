"""Convert a checkpoint between Hugging Face's format and Megatron-Core's. The same as `stare-megatron convert`.

python tools/convert_checkpoint.py MODEL OUT --processes 2 --verify
"""

from __future__ import annotations

import sys

from stare_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
