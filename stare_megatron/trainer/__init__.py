"""Trainer ranks on Megatron-Core: the only package that imports megatron. No ray.

Importing it patches Megatron-Core, before any module of it can be imported.
"""

import stare_megatron_patches

stare_megatron_patches.apply("megatron-core")
