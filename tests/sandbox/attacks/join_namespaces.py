# Go back into the namespaces of the machine.
# Expect: ok
# From: filter
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for pid in (1, os.getppid(), TARGET["driver"]):
    for kind in ("mnt", "net", "user"):
        try:
            fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        except OSError as e:
            print(e)
            continue
        if libc.setns(fd, 0) == 0:
            print("ESCAPED joined", kind)
