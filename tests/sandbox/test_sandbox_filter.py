"""The system-call filter of both architectures, by an interpreter of classic BPF, and its numbers by the headers."""

from __future__ import annotations

import errno
import platform
import re
import struct
from pathlib import Path

import pytest

from stare_megatron.sandbox import seccomp, syscalls
from stare_megatron.sandbox.seccomp import ALLOW, ERRNO, KILL_PROCESS

PID = 4242
REFUSED = ERRNO | errno.EPERM
HAZARDS = {
    "x86_64": {
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "ptrace": 101,
        "socket": 41,
        "connect": 42,
        "bpf": 321,
    },
    "aarch64": {"clone": 220, "execve": 221, "ptrace": 117, "socket": 198, "connect": 203, "bpf": 280},
}
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def evaluate(code: bytes, number: int, arguments=(), arch: int | None = None) -> int:
    """What the filter says of a call: linux/filter.h's instructions that it uses, over struct seccomp_data."""
    assert arch is not None
    padded = [a & (2**64 - 1) for a in (*arguments, *[0] * 6)][:6]
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    steps = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    at = accumulator = 0
    while True:
        operation, yes, no, k = steps[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif operation == 0x54:
            accumulator &= k
        elif operation == 0x15:
            at += yes if accumulator == k else no
        elif operation == 0x35:
            at += yes if accumulator >= k else no
        elif operation == 0x06:
            return k
        else:
            raise AssertionError(f"instruction {operation:#x}")


@pytest.fixture(params=syscalls.ARCHITECTURES)
def ask(request):
    """`ask(name or number, *arguments)` of one architecture's filter."""
    architecture = syscalls.ARCHITECTURES[request.param]
    code = seccomp.program(architecture, PID)

    def asked(call, *arguments, arch=architecture.audit):
        number = call if isinstance(call, int) else architecture.numbers[call]
        return evaluate(code, number, arguments, arch)

    asked.machine, asked.numbers = request.param, architecture.numbers
    return asked


def test_plain_calls_are_allowed_and_all_others_refused(ask):
    allowed = {n for n in range(600) if ask(n, *[2**63 - 1] * 6) == ALLOW}
    assert allowed == {ask.numbers[name] for name in seccomp.PLAIN if name in ask.numbers}
    for name, number in HAZARDS[ask.machine].items():
        assert ask(number, 17) == REFUSED, name


def test_other_architectures_are_killed(ask):
    for audit in (0x40000003, 0x40000028, 0xC00000F3):
        assert ask("read", arch=audit) == KILL_PROCESS
    assert ask(0x40000000) == KILL_PROCESS
    assert ask(0x40000000 + ask.numbers["read"]) == KILL_PROCESS


def test_signals_reach_only_the_process_itself(ask):
    for name in ("kill", "tgkill"):
        assert ask(name, PID, 9) == ALLOW
        assert ask(name, PID | 0xABC << 32, 9) == ALLOW  # the kernel reads an int
        for other in (0, 1, -1, -PID, PID + 1, PID << 32):
            assert ask(name, other, 9) == REFUSED, other


def test_arguments_are_looked_at(ask):
    assert ask("openat", -100, 0, 0o2000000) == ALLOW
    assert ask("openat", -100, 0, 0o1 | 0o100 | 0o1000) == ALLOW
    assert ask("openat", -100, 0, 0o2 | 0o1000) == ALLOW
    assert ask("openat", -100, 0, 0o1000) == REFUSED
    assert ask("openat", -100, 0, 0o3 | 0o1000) == REFUSED
    assert ask("socketpair", 1, 1 | 0o2000000 | 0o4000) == ALLOW
    for family, kind in ((1, 2), (1, 5), (2, 1), (16, 1), (1 | 1 << 8, 1)):
        assert ask("socketpair", family, kind) == REFUSED
    assert ask("sendto", 3, 1, 1, 0, 0) == ALLOW
    for address in (1, 1 << 32, 2**64 - 1):
        assert ask("sendto", 3, 1, 1, 0, address) == REFUSED
    assert ask("prlimit64", 0, 7, 0) == ALLOW
    assert ask("prlimit64", PID, 7, 0) == ALLOW
    assert ask("prlimit64", 0, 7, 1 << 40) == REFUSED
    assert ask("prlimit64", 1, 7, 0) == REFUSED
    assert ask("fcntl", 3, 1030) == ALLOW
    for command in (8, 10, 1024, 1031, 1033):  # owner, signal, lease, pipe size, seals
        assert ask("fcntl", 3, command) == REFUSED
    assert ask("ioctl", 3, 0x5401) == ALLOW
    for request in (0x5412, 0x541C, 0x8902):  # put input into a terminal, its selection, a socket's owner
        assert ask("ioctl", 3, request) == REFUSED


def test_what_is_answered_without_being_done(ask):
    assert ask("clone3") == ask("openat2") == ERRNO | errno.ENOSYS
    assert ask("fchmodat") == ask("utimensat") == ERRNO
    assert ask("listxattr") == ERRNO | errno.EOPNOTSUPP


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_the_kernels(machine):
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]} here")
    text = HEADERS[machine].read_text()
    theirs = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    if machine == "aarch64":  # the generic table names some by their 64-bit form
        theirs["newfstatat"] = theirs["fstatat"]
    ours = syscalls.ARCHITECTURES[machine].numbers
    recent = {"fchmodat2"}  # not in every header
    wrong = {
        n: (v, theirs.get(n)) for n, v in ours.items() if theirs.get(n) != v and not (n in recent and n not in theirs)
    }
    assert wrong == {}


def test_this_machine_has_a_table():
    if platform.system() != "Linux" or platform.machine() not in syscalls.ARCHITECTURES:
        pytest.skip("another machine")
    assert syscalls.call("getpid") > 0
    with pytest.raises(OSError, match=r"close: Bad file descriptor"):
        syscalls.call("close", 99999)
