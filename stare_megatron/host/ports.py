"""TCP ports and addresses: free ones for rendezvous points, and whether something answers at one."""

from __future__ import annotations

import random
import socket

import psutil

# Below the range from which systems give ports to outgoing connections (Linux: 32768 and up), so that none of those
# takes a port between its choice and its use.
_RANGE = range(20000, 32000)
_TRIES = 100
_CONNECT_S = 3.0
_kept: list[socket.socket] = []


def free_port() -> int:
    """A port on which nothing listens on this machine, and which no other call gives while this process lives, in this
    process or another: a socket stays bound to it. Whoever listens there sets SO_REUSEADDR, as servers and PyTorch's
    stores do.

    Raises:
        OSError: none of a hundred tries was free.
    """
    for port in random.SystemRandom().sample(_RANGE, _TRIES):
        s = socket.socket()
        try:
            s.bind(("", port))
        except OSError:
            s.close()
            continue
        # Not before: with it the port of another call would seem to be free.
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _kept.append(s)
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
