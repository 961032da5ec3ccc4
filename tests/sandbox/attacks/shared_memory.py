# POSIX and System V shared memory, message queues, semaphores.
# Expect: ok
# From: filter
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for name, call in (
    ("shmget", lambda: libc.shmget(0, 4096, 0o1666)),
    ("msgget", lambda: libc.msgget(0, 0o1666)),
    ("semget", lambda: libc.semget(0, 1, 0o1666)),
    ("mq_open", lambda: libc.syscall(240, b"escaped", 0o102, 0o666, None)),
):
    if call() >= 0:
        print("ESCAPED", name)
