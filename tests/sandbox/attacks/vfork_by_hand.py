# fork, vfork, clone and clone3 by number.
# Expect: ok
import ctypes
import platform

libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": (57, 58, 56, 435), "aarch64": (220, 435)}[platform.machine()]
parent = libc.getpid()
for number in numbers:
    flags = 17 if number in (56, 220) else 0
    result = libc.syscall(ctypes.c_long(number), ctypes.c_long(flags), None, None, None, None)
    if result >= 0:
        if libc.getpid() != parent:
            import time

            time.sleep(1000)
        print("ESCAPED a process by call", number)
