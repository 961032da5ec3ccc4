"""Seeds derived from seeds, the same in every process and Python version (`hash()` is neither)."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) from the parts, in order: BLAKE2b of their decimal text."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
