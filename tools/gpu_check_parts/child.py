"""Be one part: python -m tools.gpu_check_parts.child PART DEVICE FOLDER SHARED SECONDS BESIDE"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from stare_megatron.host.files import write_atomic
from tools.gpu_check_parts.outcome import FILE, Context
from tools.gpu_check_parts.parts import PARTS


def main(argv: list[str]) -> int:
    name, device, folder, shared, seconds, beside = argv
    module, _, function = PARTS[name].where.partition(":")
    context = Context(device, Path(folder), Path(shared), float(seconds), beside == "beside")
    found = vars(importlib.import_module(module))[function](context)
    write_atomic(Path(folder, FILE), found.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
