# A user namespace makes an unprivileged process root in it, and opens most of the kernel.
# Expect: ok
# From: filter
import ctypes

libc = ctypes.CDLL(None, use_errno=True)
for name, flag in {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000}.items():
    if libc.unshare(flag) == 0:
        print("ESCAPED new namespace", name)
