"""A worker process: imports what code is likely to use, then forks a confined child on request and reports its end.

It never sees code, input or output: those go from the driver to the child through files that are handed over with the
request. So a child, which starts as a copy of this process's memory, finds nothing of other calls in it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from dataclasses import replace

from stare_megatron.sandbox import anchors, confine, namespaces, runner, scratch
from stare_megatron.sandbox.confine import Inherited
from stare_megatron.sandbox.plan import FIRST_UID, REPORT, UIDS, Limits, Plan, decode_plan

MESSAGE = 4096  # longest message on the control socket
NOT_CONFINED = 125  # exit code of a child that could not give up what it must


class Zygote:
    """The loop of one worker. `control`: SOCK_SEQPACKET socket to the driver."""

    def __init__(self, plan: Plan, control: socket.socket, inherited: Inherited, value_bytes: int) -> None:
        self._plan = plan
        self._control = control
        self._inherited = inherited
        self._value_bytes = value_bytes
        self._names: dict[int, str] = {}
        self._forks = 0

    def run(self) -> None:
        """Serve until the driver goes away; then nothing of it is left."""
        wake, signalled = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if wake in ready:
                os.read(wake, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._serve():
                break
        for pid in self._names:
            os.kill(pid, signal.SIGKILL)
        while self._names:
            self._reap(block=True)

    def _serve(self) -> bool:
        """One request; False when the driver is gone."""
        message, files, _, _ = socket.recv_fds(self._control, MESSAGE, REPORT + 1)
        if not message:
            return False
        limits = Limits(**json.loads(message))
        self._forks += 1
        try:
            pid = self._fork(limits, files)
        except OSError as e:
            self._tell({"failed": limits.name, "why": f"fork: {e.strerror}"})
        else:
            self._names[pid] = limits.name
            handle = os.pidfd_open(pid)
            self._tell({"forked": limits.name}, handle)
            os.close(handle)
        finally:
            for fd in files:
                os.close(fd)
        return True

    def _fork(self, limits: Limits, files: list[int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            signal.set_wakeup_fd(-1)
            high = [os.dup2(fd, 200 + index) for index, fd in enumerate(files)]
            for index, fd in enumerate(high):
                os.dup2(fd, index)
            # User ids are spread, so that two calls seldom share one even where the file system keeps them apart.
            plan = replace(self._plan, uid=FIRST_UID + (self._plan.uid - FIRST_UID + self._forks) % UIDS)
            confine.confine(plan, limits, self._inherited)
            runner.serve(self._value_bytes)
        except OSError as e:
            os.write(2, str(e).encode())
        finally:
            os._exit(NOT_CONFINED)

    def _reap(self, block: bool = False) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0 if block else os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._names:
                milliseconds = 1000 * (usage.ru_utime + usage.ru_stime)
                end = {"ended": self._names.pop(pid), "status": status, "cpu_ms": milliseconds}
                self._tell(end)

    def _tell(self, message: dict[str, object], *files: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the loop notices that the driver is gone
            socket.send_fds(self._control, [json.dumps(message).encode()], files)


def main() -> None:
    """`python -c "...main()" PLAN CONTROL_FD VALUE_BYTES`."""
    plan, value_bytes = decode_plan(sys.argv[1]), int(sys.argv[3])
    control = socket.socket(fileno=int(sys.argv[2]))
    try:
        if plan.namespaces:
            namespaces.unshare()
            _second(plan.base)
        confine.hide()
        size = os.open("/proc/self/statm", os.O_RDONLY)
        if plan.namespaces:
            namespaces.private_root(plan.base, plan.readable)
        kept = anchors.reroute() if os.geteuid() == 0 and not plan.namespaces else 0
        for name in plan.preload:
            importlib.import_module(name)
    except (OSError, ImportError) as e:
        control.send(json.dumps({"refused": str(e)[:1000]}).encode())
        return
    gc.collect()
    gc.freeze()  # the collector would otherwise touch, and so copy, every page in each child
    control.send(json.dumps({"ready": os.getpid()}).encode())
    mapped = int(os.pread(size, 256, 0).split()[0]) * resource.getpagesize()
    os.close(size)
    Zygote(plan, control, Inherited(mapped, kept), value_bytes).run()
    if not plan.namespaces:
        scratch.remove(plan.base)  # also where the driver was killed and cannot


def _second(base: str) -> None:
    """Go on in a child, the first process of the new process-id namespace; this one waits for it and cleans up."""
    # Opened now: the child's change of root is this process's as well.
    parent = os.open(os.path.dirname(base), os.O_PATH | os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        confine.hide()
        os.closerange(3, parent)
        os.closerange(parent + 1, 1024)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(os.path.basename(base), dir_fd=parent)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    os.close(parent)
    confine.die_with_parent()
