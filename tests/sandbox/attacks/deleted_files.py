# Files that are removed and still open take space that no listing shows.
# Expect: ok
# From: namespaces
import os

total, kept = 0, []
try:
    for i in range(50):
        f = open(f"x{i}", "w+b", buffering=0)
        os.unlink(f"x{i}")
        kept.append(f)
        for _ in range(8):
            total += f.write(b"x" * (1 << 20))
except OSError as e:
    print(e)
if total > 8 << 20:
    print("ESCAPED wrote", total)
