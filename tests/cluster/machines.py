"""A cluster of "machines" on one Linux box: each has its own network, host name, processes, /tmp and /dev/shm.

They are namespaces, joined by a bridge in one more; nothing is made in the box's own network, and everything goes with
their first processes. Needs root. Folders outside of /tmp are seen by all machines, unless `Machine.hide` says
otherwise, as on a shared file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
PORT = 6790
_NETWORK = "10.77.0"
# $1: hosts file, $2: host name, $3: the checkout, which may lie under /tmp.
_SETUP = """
set -eu
hostname "$2"; ip link set lo up; mount --bind "$1" /etc/hosts
keep=$(mktemp -d /var/tmp/keep.XXXXXX); mount --bind "$3" "$keep"
mount -t tmpfs -o mode=1777 tmpfs /tmp; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mkdir /tmp/home
case $3 in /tmp/*) mkdir -p "$3"; mount --bind "$keep" "$3";; esac
umount "$keep"; rmdir "$keep"
exec sleep infinity
"""


def why_not() -> str:
    """Why machines cannot be made here; "" where they can."""
    if os.name != "posix" or os.geteuid():
        return "machines are namespaces, which need root"
    missing = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if missing:
        return f"machines need {', '.join(missing)} (Debian: util-linux, iproute2)"
    tried = subprocess.run(["unshare", "-m", "-u", "-n", "-i", "-p", "-f", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _inside(pid: int, command: Sequence[str], network_only: bool = False) -> list[str]:
    spaces = ["-n"] if network_only else ["-m", "-u", "-n", "-i", "-p"]
    return ["nsenter", "-t", str(pid), *spaces, "--", *command]


def _ip(pid: int, *words: str) -> None:
    subprocess.run(_inside(pid, ["ip", *words], network_only=True), check=True, capture_output=True)


@dataclass(frozen=True)
class Machine:
    """`pid`: its first process, as the box numbers it; `hub`: that of the namespace with the bridge."""

    number: int
    pid: int
    hub: int

    @property
    def name(self) -> str:
        return f"n{self.number}"

    @property
    def address(self) -> str:
        return f"{_NETWORK}.{self.number}"

    def start(
        self, command: Sequence[str | Path], output: IO[str] | int = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        """A process there, its output in one."""
        own = {
            "HOME": "/tmp/home",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "STARE_DEVICE": "cpu",
        } | environment
        words = _inside(self.pid, ["env", *(f"{k}={v}" for k, v in own.items()), *map(str, command)])
        return subprocess.Popen(
            words, cwd="/", stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, text=True
        )

    def run(self, command: Sequence[str | Path], timeout: float = 800, **environment: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(command, **environment)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            raise AssertionError(f"{self.name}: {command} took more than {timeout:g} s\n{said[-3000:]}") from None
        return process.returncode, said

    def ray(self, cpus: int, *options: str, **environment: str) -> None:
        """Start Ray's processes: the head's on the first machine, else joining it."""
        head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        how = head if self.number == 1 else [f"--address={_NETWORK}.1:{PORT}"]
        where = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--temp-dir=/tmp/ray"]
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", *how, *where]
        code, said = self.run([*start, "--object-store-memory=150000000", *options], **environment)
        assert code == 0, said

    def unplug(self) -> None:
        _ip(self.hub, "link", "set", f"v{self.number}", "down")

    def plug(self) -> None:
        _ip(self.hub, "link", "set", f"v{self.number}", "up")

    def hide(self, folder: Path) -> None:
        """Give this machine an empty folder of its own there, as without a shared file system."""
        code, said = self.run(["mount", "-t", "tmpfs", "tmpfs", folder])
        assert code == 0, said

    def switch_off(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # takes every process of its namespace along


@contextlib.contextmanager
def machines(count: int, folder: Path, *, debian: bool = False) -> Iterator[list[Machine]]:
    """Machines n1, n2, ... at 10.77.0.1, ..., ended on leaving. `folder`: empty, for what they need.

    `debian`: a machine takes its own name for 127.0.1.1, as Debian installs it, and not for its address.
    """
    with contextlib.ExitStack() as stack:

        def begin(*words: str) -> int:
            """The process that `unshare` forks, once it is in a network of its own."""
            process = subprocess.Popen(["unshare", *words], stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            own, deadline = os.readlink("/proc/self/ns/net"), time.monotonic() + 120
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError, LookupError):
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    pid = int(children[0]) if "-f" in words else process.pid
                    if os.readlink(f"/proc/{pid}/ns/net") != own and Path(f"/proc/{pid}/comm").read_text() == "sleep\n":
                        return pid
                assert process.poll() is None, f"unshare {words} ended with code {process.returncode}"
                time.sleep(0.02)
            raise AssertionError(f"unshare {words} was not ready within 120 s")

        hub = begin("-n", "sleep", "infinity")
        _ip(hub, "link", "add", "br0", "type", "bridge")
        _ip(hub, "link", "set", "br0", "up")
        made = []
        for number in range(1, count + 1):
            others = [n for n in range(1, count + 1) if not debian or n != number]
            lines = ["127.0.0.1 localhost", *([f"127.0.1.1 n{number}"] if debian else [])]
            hosts = folder / f"hosts{number}"
            hosts.write_text("\n".join([*lines, *(f"{_NETWORK}.{n} n{n}" for n in others)]) + "\n")
            options = ["-m", "-u", "-n", "-i", "-p", "-f", "--kill-child", "--mount-proc", "--propagation", "private"]
            pid = begin(*options, "bash", "-c", _SETUP, "setup", str(hosts), f"n{number}", str(ROOT))
            _ip(hub, "link", "add", f"v{number}", "type", "veth", "peer", "name", f"p{number}")
            _ip(hub, "link", "set", f"p{number}", "netns", str(pid))
            _ip(hub, "link", "set", f"v{number}", "master", "br0", "up")
            _ip(pid, "link", "set", f"p{number}", "name", "eth0")
            _ip(pid, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "eth0")
            _ip(pid, "link", "set", "eth0", "up")
            made.append(Machine(number, pid, hub))
        yield made
