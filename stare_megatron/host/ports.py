"""TCP ports for rendezvous points that are opened a little after they were chosen."""

from __future__ import annotations

import random
import socket

import psutil

# Below the range from which systems give ports to outgoing connections (Linux: 32768 and up), so that none of those
# takes a port between its choice and its use.
_RANGE = range(20000, 32000)


def free_port() -> int:
    """A port on which nothing listens on this machine at the moment of asking.

    Raises:
        OSError: none of a hundred tries was free.
    """
    for port in random.SystemRandom().sample(_RANGE, 100):
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free TCP port found between {_RANGE.start} and {_RANGE.stop}")


def interface_of(address: str) -> str:
    """The network interface of this machine that carries an address; "" if none does."""
    return next((name for name, known in psutil.net_if_addrs().items() if any(a.address == address for a in known)), "")
