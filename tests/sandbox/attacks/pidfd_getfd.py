# Take a file out of another process.
# Expect: ok
# From: filter
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), TARGET["driver"], TARGET["victim"]):
    try:
        handle = os.pidfd_open(pid)
    except OSError as e:
        print(e)
        continue
    print("ESCAPED a handle on", pid)
    for fd in range(20):
        if libc.syscall(438, handle, fd, 0) >= 0:
            print("ESCAPED took", fd)
