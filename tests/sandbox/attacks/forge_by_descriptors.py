# Write an answer on every descriptor there is.
# Expect: tampered
import os
import struct

for fd in range(3, 64):
    try:
        os.write(fd, b"\0" * 16 + b"O" + struct.pack("=II", 0, 2) + b"42")
    except OSError:
        pass
os._exit(0)
