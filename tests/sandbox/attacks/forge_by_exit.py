# Leave before the checks that follow, with a zero.
# Expect: exited
import os

print("all tests passed")
os.write(1, b"OK\n")
os._exit(0)
assert False
