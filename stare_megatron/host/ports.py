"""TCP ports and addresses: free ones for rendezvous points, and whether something answers at one."""

from __future__ import annotations

import random
import socket

import psutil

# Below the range from which systems give ports to outgoing connections (Linux: 32768 and up), so that none of those
# takes a port between its choice and its use.
_RANGE = range(20000, 32000)
_CONNECT_S = 3.0


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


def host_port(address: str) -> tuple[str, int] | None:
    """The two parts of HOST:PORT (of an IPv6 address without its brackets); None for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        return None
    return host.strip("[]"), int(port)


def connect_error(target: tuple[str, int]) -> str:
    """Why a TCP connection to a host and port fails; "" if it does not."""
    try:
        socket.create_connection(target, timeout=_CONNECT_S).close()
    except OSError as e:
        return e.strerror or str(e)
    except ValueError as e:  # no name that a resolver takes
        return str(e)
    return ""


def interface_of(address: str) -> str:
    """The network interface of this machine that carries an address; "" if none does."""
    return next((name for name, known in psutil.net_if_addrs().items() if any(a.address == address for a in known)), "")
