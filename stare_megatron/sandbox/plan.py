"""What a worker process is told when it starts, and each of its children when it is forked. JSON both."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass

from stare_megatron.sandbox.level import Level

# Descriptors of a child, in the order in which they are handed over.
STDIN, STDOUT, STDERR, CODE, GO, REPORT = range(6)
FIRST_UID = 61184  # a range that systemd keeps for service accounts made on the fly
UIDS = 4096


@dataclass(frozen=True)
class Plan:
    """A worker's start. `base`: its directory; `uid`: whom root's children become, -1: whoever runs it."""

    level: str
    landlock: bool
    base: str
    preload: tuple[str, ...]
    uid: int
    readable: tuple[str, ...]

    @property
    def namespaces(self) -> bool:
        return Level(self.level) is Level.NAMESPACES

    @property
    def seccomp(self) -> bool:
        return Level(self.level) >= Level.FILTER


@dataclass(frozen=True)
class Limits:
    """A child's limits, beyond which the kernel refuses. `cpu_seconds` over its whole life; 0: none."""

    name: str
    cpu_seconds: int
    memory_mb: int
    scratch_mb: int
    scratch_files: int


def encode(value: Plan | Limits) -> str:
    return json.dumps(asdict(value))


def decode_plan(text: str) -> Plan:
    tree = json.loads(text)
    return Plan(**tree | {"preload": tuple(tree["preload"]), "readable": tuple(tree["readable"])})


def readable_paths() -> tuple[str, ...]:
    """What Python and compiled packages read: the interpreter's libraries, installed packages, the system's shared
    libraries, time zones. Each as it is spelt and as it resolves; nothing of the project.
    """
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    wanted = [sysconfig.get_path(name) for name in names]
    wanted += [os.path.join(prefix, "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    wanted += [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if os.path.isabs(p)]
    both = sorted(
        {p for path in wanted if os.path.exists(path) for p in (os.path.abspath(path), os.path.realpath(path))}
    )
    return tuple(p for p in both if not any(p != q and p.startswith(q + "/") for q in both))
