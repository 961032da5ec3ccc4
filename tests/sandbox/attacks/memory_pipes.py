# Kernel memory in pipes.
# Expect: ok
import fcntl
import os

total = 0
try:
    for _ in range(10000):
        r, w = os.pipe()
        os.set_blocking(w, False)
        try:
            fcntl.fcntl(w, 1031, 1 << 20)
        except OSError:
            pass
        try:
            while True:
                total += os.write(w, b"x" * 65536)
        except BlockingIOError:
            pass
except OSError:
    pass
if total > 40 << 20:
    print("ESCAPED", total, "bytes in pipes")
