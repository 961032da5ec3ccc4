# Change user, group, capabilities.
# Expect: ok
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for attempt in (
    lambda: os.setuid(0),
    lambda: os.setgid(0),
    lambda: os.setreuid(0, 0),
    lambda: os.setresuid(0, 0, 0),
    lambda: os.setgroups([0]),
):
    try:
        attempt()
        print("ESCAPED changed user")
    except OSError as e:
        print(e)
if libc.prctl(23, 21, 0, 0, 0) == 1:
    print("may still gain CAP_SYS_ADMIN: harmless without a program to run")
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
if libc.capset(header, data) == 0:
    print("ESCAPED has capabilities")
if 0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()):
    print("ESCAPED is root")
