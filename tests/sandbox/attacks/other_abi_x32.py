# The same for x32.
# Expect: killed, ok
# From: filter
import ctypes
import platform

if platform.machine() == "x86_64":
    print("x32 answered", ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39)))
