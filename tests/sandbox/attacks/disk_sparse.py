# A file that says it is huge.
# Expect: ok
import os

with open("sparse", "wb", buffering=0) as f:
    for attempt in (
        lambda: os.ftruncate(f.fileno(), 1 << 40),
        lambda: os.posix_fallocate(f.fileno(), 0, 1 << 40),
        lambda: os.pwrite(f.fileno(), b"x", 1 << 40),
    ):
        try:
            attempt()
            print("ESCAPED made a terabyte")
        except OSError as e:
            print(e)
