"""Ports that are asked for before somebody listens there."""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stare_megatron.host import ports


def test_a_port_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a range of which each is wanted, in this process and in another one, also before anybody listens."""
    begin = ports.free_port()
    monkeypatch.setattr(ports, "_RANGE", range(begin, begin + 100))
    code = (
        "import sys\nfrom stare_megatron.host import ports\n"
        f"ports._RANGE = range({begin}, {begin + 100})\n"
        "print(*(ports.free_port() for _ in range(20)), flush=True)\nsys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = [int(port) for port in other.stdout.readline().split()]
    mine = [ports.free_port() for _ in range(20)]
    assert len({begin, *mine, *theirs}) == 41
    other.communicate()
    monkeypatch.setattr(ports, "_RANGE", range(begin, begin + 1))
    monkeypatch.setattr(ports, "_TRIES", 1)
    with pytest.raises(OSError, match="no free TCP port found between"):
        ports.free_port()


def test_whoever_asked_can_listen_there_and_nobody_answers_before() -> None:
    first, second = ports.free_port(), ports.free_port()
    assert "refused" in ports.connect_error(("127.0.0.1", first))
    server = HTTPServer(("127.0.0.1", first), BaseHTTPRequestHandler)
    assert ports.connect_error(("127.0.0.1", first)) == ""
    server.server_close()

    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", second, 1, True, timeout=datetime.timedelta(seconds=60))
    store.set("key", "value")
    assert store.get("key") == b"value"
    with socket.socket() as taken, pytest.raises(OSError, match="in use"):
        taken.bind(("", second))


@pytest.mark.parts
def test_vllm_can_meet_there() -> None:
    """As trainer ranks and workers do before they push by NCCL."""
    code = (
        "from vllm.distributed.utils import StatelessProcessGroup\n"
        "from stare_megatron.host.ports import free_port\n"
        "group = StatelessProcessGroup.create('127.0.0.1', free_port(), 0, 1)\n"
        "print(group.broadcast_obj('met', 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1:] == ["met"], done.stderr[-2000:]
