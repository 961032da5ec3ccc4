"""Run Python snippets through the sandbox and look, from outside, for what they reached.

python tools/attack_sandbox.py FILE... [--level limits|filter|landlock|namespaces] [--seconds 10]

Without --level: the strongest level of this machine. Each snippet finds a dictionary TARGET (see `Canaries.target`)
that tells it where the prizes are; lines `# %%` split it into cells of one kept state. One verdict per line:
`contained`, or what leaked. It leaked if a planted secret is in its output, a planted file changed, a planted process
was hit, the planted listeners heard from it, a process, a shared object or a scratch directory is left, another call
is disturbed, the next one does not work, or it prints ESCAPED. Exit code: 1 if anything leaked, 2 if the level is not
available.

Comment lines at the top of a snippet, all optional: `# Expect: STATUS, STATUS`, `# From: LEVEL` (the weakest level that
is said to contain it), `# Seconds: N` (less time than the others).
"""

# A default given to Field by position is invisible to the type checker.
# pyright: reportCallIssue=false

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from stare_megatron.config.sandbox import SandboxConfig
from stare_megatron.errors import RunError, UserError
from stare_megatron.sandbox.level import Level
from stare_megatron.sandbox.pool import Sandbox
from stare_megatron.sandbox.result import Result, Status

LIMITS = SandboxConfig(
    workers=1,
    wall_seconds=60.0,
    cpu_seconds=20.0,
    memory_mb=192,
    output_bytes=20000,
    scratch_mb=8,
    scratch_files=64,
    preload=["numpy"],
)


@dataclass(frozen=True)
class Attack:
    """A snippet and what its header says of it."""

    name: str
    cells: tuple[str, ...]
    expect: tuple[Status, ...]
    weakest: Level
    seconds: float


def read_attack(path: Path) -> Attack:
    """Raises:
    UserError: no such file, or a header that cannot be understood.
    """
    try:
        text = path.read_text()
        header = dict(re.findall(r"^# (Expect|From|Seconds): (.+)$", text, re.MULTILINE))
        expect = tuple(Status(word) for word in re.split(r",\s*", header.get("Expect", "")) if word)
        weakest = Level(header.get("From", Level.LIMITS.value))
        seconds = float(header.get("Seconds", "inf"))
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from e
    except ValueError as e:
        raise UserError(f"{path}: {e}") from e
    return Attack(path.stem, tuple(re.split(r"^# %%\n", text, flags=re.MULTILINE)), expect, weakest, seconds)


class Canaries:
    """Things on this machine that an attack would like to reach, and whether it did."""

    def __init__(self) -> None:
        self._keep = contextlib.ExitStack()
        self.secret = "CANARY-" + secrets.token_hex(12)
        folder = Path(self._keep.enter_context(tempfile.TemporaryDirectory(prefix="canaries-")))
        folder.chmod(0o755)
        self._private, self._public, self._open = folder / "private", folder / "public", folder / "open"
        self._private.write_text(self.secret)
        self._private.chmod(0o600)
        self._public.write_text(self.secret)
        self._open.mkdir()
        self._open.chmod(0o777)
        os.environ["CANARY"] = self.secret
        self._keep.callback(os.environ.pop, "CANARY", None)
        self._tcp = self._listen(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0))
        self._udp = self._listen(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0))
        self._name = "canary-" + secrets.token_hex(8)
        self._unix = self._listen(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + self._name)
        self._datagram = self._listen(socket.AF_UNIX, socket.SOCK_DGRAM, "\0" + self._name + "-d")
        command = [sys.executable, "-c", "import time; time.sleep(3600)"]
        self._victim = subprocess.Popen(command)
        self._keep.callback(self._victim.wait)
        self._keep.callback(self._victim.kill)

    def _listen(self, family: int, kind: int, address: tuple[str, int] | str) -> socket.socket:
        found = self._keep.enter_context(socket.socket(family, kind))
        found.bind(address)
        if kind == socket.SOCK_STREAM:
            found.listen(64)
        found.setblocking(False)
        return found

    def __enter__(self) -> Canaries:
        return self

    def __exit__(self, *details: object) -> None:
        self._keep.close()

    def target(self, box: Sandbox, neighbour: str) -> dict[str, object]:
        """What a snippet is told: paths of files with a secret (`private` to this user, `public` to all), a directory
        that all may write to, ports and abstract names of listeners, process ids, the sandbox's own directories, the
        scratch directory of another call ("" where it has no name here)."""
        return {
            "private": str(self._private),
            "public": str(self._public),
            "open": str(self._open),
            "tcp": self._tcp.getsockname()[1],
            "udp": self._udp.getsockname()[1],
            "abstract": self._name,
            "datagram": self._name + "-d",
            "driver": os.getpid(),
            "victim": self._victim.pid,
            "bases": box.directories(),
            "neighbour": neighbour,
        }

    def reached(self) -> Iterator[str]:
        """What was changed or heard since the last look."""
        if self._private.read_text() != self.secret or self._public.read_text() != self.secret:
            yield "a file outside was changed"
        for found in self._open.iterdir():
            yield f"a file outside was written: {found.name}"
            found.unlink()
        if oct(self._public.stat().st_mode & 0o777) != "0o644":
            yield "the mode of a file outside was changed"
        for name, listener in (("TCP", self._tcp), ("abstract", self._unix)):
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    yield f"the {name} listener was connected to"
        for name, listener in (("UDP", self._udp), ("abstract datagram", self._datagram)):
            with contextlib.suppress(BlockingIOError):
                while listener.recv(10):
                    yield f"the {name} socket was written to"
        if self._victim.poll() is not None or psutil.Process(self._victim.pid).status() == psutil.STATUS_STOPPED:
            yield "another process was signalled"


def _left() -> frozenset[str]:
    """Processes below this one, System V objects, files in the directories that all may write to."""
    processes = {f"process {p.pid} {p.name()}" for p in psutil.Process().children(recursive=True)}
    files = {
        f"file {path}"
        for folder in ("/dev/shm", "/tmp", "/var/tmp")
        for path in Path(folder).glob("escaped*")  # the names that attacks use: other programs come and go there
    }
    ipc = {
        f"System V {kind} {line.split()[1]}"
        for kind in ("shm", "msg", "sem")
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
    }
    return frozenset(processes | files | ipc)


class Arena:
    """A sandbox among canaries, and in it a kept state that no other call should be able to reach."""

    def __init__(self, config: SandboxConfig, level: Level | None) -> None:
        self.box = Sandbox(config, level)
        self._keep = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Arena:
        await self._keep.enter_async_context(self.box)
        self._canaries = self._keep.enter_context(Canaries())
        self._neighbour = await self._keep.enter_async_context(self.box.session())
        secret = self._canaries.secret
        await self._neighbour.run(f"secret = {secret!r}; open('secret', 'w').write(secret)")
        return self

    async def __aexit__(self, *details: object) -> None:
        await self._keep.aclose()

    async def attack(self, snippet: Attack) -> tuple[list[Result], list[str]]:
        """The result of each cell, and what leaked: [] if it was contained."""
        box, before = self.box, _left()
        prelude = f"TARGET = {json.dumps(self._canaries.target(box, self._neighbour.scratch))}\n"
        results = []
        if len(snippet.cells) == 1:
            results.append(await box.run(prelude + snippet.cells[0], echo=True, seconds=snippet.seconds))
        else:
            async with box.session() as session:
                for cell in snippet.cells:
                    results.append(await session.run(prelude + cell, echo=True, seconds=snippet.seconds))
        leaks = [*self._canaries.reached(), *(f"left behind: {thing}" for thing in sorted(_left() - before))]
        look = "import os; print(secret == open('secret').read(), os.listdir())"
        unchanged = await self._neighbour.run(look)
        if unchanged.stdout != "True ['secret']\n":
            leaks.append(f"another call was disturbed: {unchanged.status.value}")
        for result in results:
            said = result.stdout + result.stderr + result.value
            leaks += ["a secret was read"] * (self._canaries.secret in said)
            leaks += re.findall(r"ESCAPED.*", result.stdout)
            if result.status is Status.LOST:
                leaks.append(f"the tool failed: {result.stderr}")
        present = {name for base in box.directories() for name in os.listdir(base)}
        leaks += [f"scratch left: {name}" for name in present - {Path(self._neighbour.scratch).name}]
        if not await box.check():
            leaks.append("the next call does not work")
        return results, leaks


async def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="Python snippets")
    parser.add_argument("--level", choices=[level.value for level in Level], help="default: the strongest")
    parser.add_argument("--seconds", type=float, default=10.0, help="wall-clock limit of a snippet")
    options = parser.parse_args(arguments)
    config = LIMITS.model_copy(update={"wall_seconds": options.seconds, "require": Level.LIMITS.value})
    bad = 0
    try:
        snippets = [read_attack(path) for path in options.files]
        async with Arena(config, Level(options.level) if options.level else None) as arena:
            means = sorted(mechanism.name.lower() for mechanism in arena.box.mechanisms)
            sys.stdout.write(f"level {arena.box.level.value}: {', '.join(means)}\n")
            for snippet in snippets:
                results, leaks = await arena.attack(snippet)
                bad += bool(leaks)
                verdict = "; ".join(dict.fromkeys(leaks)) or "contained"
                status = ", ".join(result.status.value for result in results)
                sys.stdout.write(f"{snippet.name:32} {status:10} {verdict}\n")
                sys.stdout.flush()
    except (UserError, RunError) as e:
        sys.stderr.write(f"{e}\n")
        return 2
    sys.stdout.write(f"{len(snippets) - bad} of {len(snippets)} contained\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
