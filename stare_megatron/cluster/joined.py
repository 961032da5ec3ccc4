"""Wait until a cluster has all its nodes: `python -m stare_megatron.cluster.joined HOST:PORT NODES SECONDS`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence

import ray

from stare_megatron.cluster.nodes import nodes

_POLL_S = 1.0


def main(argv: Sequence[str]) -> int:
    """Exit code 1, and a line that names those who came, where they are fewer after that time."""
    address, count, seconds = argv[0], int(argv[1]), float(argv[2])
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    deadline = time.monotonic() + seconds
    while len(there := nodes()) < count:
        if time.monotonic() > deadline:
            names = ", ".join(node.name for node in there)
            sys.stderr.write(f"{len(there)} of {count} nodes joined Ray within {seconds:.0f} s: {names}\n")
            return 1
        time.sleep(_POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
