# Trace the parent, or anything.
# Expect: ok
# From: filter
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), TARGET["driver"], TARGET["victim"]):
    for request in (16, 0x4206):
        if libc.ptrace(request, pid, None, None) == 0:
            print("ESCAPED attached to", pid)
if libc.ptrace(0, 0, None, None) == 0:
    print("ESCAPED asked to be traced")
