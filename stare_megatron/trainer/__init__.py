"""Trainer ranks on Megatron-Core: the only package that imports megatron. No ray.

Importing it patches Megatron-Core, before any module of it can be imported.
"""

import sys
from typing import Any

import stare_megatron_patches
from stare_megatron.host import device

# Megatron-Core takes what is installed: on a CPU an Adam that needs a GPU, beside local layers another's.
_hidden: Any = None
for _name, _serves in (("transformer_engine", device.has_transformer_engine()), ("apex", device.has_apex())):
    if not _serves:
        sys.modules.setdefault(_name, _hidden)

stare_megatron_patches.apply("megatron-core")
