# rt_sigqueueinfo, tkill, pidfd_send_signal, owners of descriptors.
# Expect: ok
# From: filter
import ctypes
import fcntl
import os
import signal

libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), TARGET["victim"]):
    if libc.sigqueue(pid, signal.SIGKILL, None) == 0:
        print("ESCAPED queued")
    if libc.syscall(200, pid, signal.SIGKILL) == 0:
        print("ESCAPED tkill")
    r, w = os.pipe()
    try:
        fcntl.fcntl(r, fcntl.F_SETOWN, pid)
        print("ESCAPED set owner")
    except OSError as e:
        print(e)
