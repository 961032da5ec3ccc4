"""The levels of protection, weakest first, and what each is made of."""

from __future__ import annotations

import enum
import functools


class Mechanism(enum.Enum):
    """One means the kernel gives; the text says what it is for."""

    LIMITS = "resource limits, a clean environment, no inherited files, no new processes, an unprivileged user if root"
    SECCOMP = "a default-deny filter of system calls: no network, no signals to others, no tracing, no exec"
    LANDLOCK = "Landlock: reads only the interpreter and system libraries, writes only the call's scratch directory"
    NAMESPACES = "its own root, network, process ids, IPC; a size-limited scratch that exists nowhere else"


@functools.total_ordering
class Level(enum.Enum):
    """Named levels; `Level.FILTER < Level.LANDLOCK`. `[sandbox] require` names the weakest acceptable one."""

    LIMITS = "limits"
    FILTER = "filter"
    LANDLOCK = "landlock"
    NAMESPACES = "namespaces"

    def __lt__(self, other: Level) -> bool:
        order = list(Level)
        return order.index(self) < order.index(other)

    @property
    def mechanisms(self) -> frozenset[Mechanism]:
        """What this level must have. `NAMESPACES` uses Landlock as well where the kernel has it."""
        return _MECHANISMS[self]

    @property
    def cure(self) -> str:
        """What to enable where this level is not available."""
        return _CURES[self]


_MECHANISMS = {
    Level.LIMITS: frozenset({Mechanism.LIMITS}),
    Level.FILTER: frozenset({Mechanism.LIMITS, Mechanism.SECCOMP}),
    Level.LANDLOCK: frozenset({Mechanism.LIMITS, Mechanism.SECCOMP, Mechanism.LANDLOCK}),
    Level.NAMESPACES: frozenset({Mechanism.LIMITS, Mechanism.SECCOMP, Mechanism.NAMESPACES}),
}

_CURES = {
    Level.LIMITS: "this needs Linux, and an interpreter and packages that the user running it can read",
    Level.FILTER: "this needs a kernel with CONFIG_SECCOMP_FILTER on x86-64 or aarch64, and a container runtime that "
    "allows seccomp(2)",
    Level.LANDLOCK: "this needs Linux 5.13 or newer with `landlock` in the boot parameter lsm=, and a container "
    "runtime that allows landlock_create_ruleset(2)",
    Level.NAMESPACES: "this needs Linux 5.12 or newer, and either root with CAP_SYS_ADMIN (a container: --privileged) "
    "or unprivileged user namespaces (sysctl user.max_user_namespaces > 0, kernel.unprivileged_userns_clone=1, "
    "kernel.apparmor_restrict_unprivileged_userns=0; a container: --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined)",
}
