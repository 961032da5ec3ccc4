# Anonymous and shared mappings, touched.
# Expect: ok
import mmap

kept = []
try:
    for _ in range(1000):
        m = mmap.mmap(-1, 4 << 20)
        m[::4096] = b"x" * 1024
        kept.append(m)
except (OSError, ValueError, MemoryError):
    pass
if len(kept) > 100:
    print("ESCAPED", 4 * len(kept), "MiB mapped")
