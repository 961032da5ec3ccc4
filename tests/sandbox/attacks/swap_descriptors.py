# Put the output where the answer goes and the other way round.
# Expect: tampered, exited, timeout
# Seconds: 1
import os

os.dup2(1, 4)
os.dup2(5, 1)
print("forged" * 10, flush=True)
