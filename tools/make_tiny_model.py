"""Make and warm up a tiny checkpoint and its task's prompts, on a CPU: `stare-megatron make-tiny-model`.

python tools/make_tiny_model.py --out .cache/demo
"""

from __future__ import annotations

import sys

from stare_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["make-tiny-model", *sys.argv[1:]]))
