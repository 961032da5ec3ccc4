# Files that live in memory and count towards no process.
# Expect: ok
# From: filter
import os

total = 0
try:
    for i in range(1000):
        fd = os.memfd_create("x")
        for _ in range(8):
            total += os.write(fd, b"x" * (1 << 20))
except OSError:
    pass
if total > 0:
    print("ESCAPED wrote", total)
