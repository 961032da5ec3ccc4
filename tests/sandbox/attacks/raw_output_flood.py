# The same past Python's streams, in writes of several megabytes.
# Expect: output
import os

while True:
    os.write(1, b"x" * (8 << 20))
