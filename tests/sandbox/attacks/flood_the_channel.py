# Fill the runner's channel.
# Expect: tampered, timeout
# Seconds: 1
import os

while True:
    for fd in range(3, 16):
        try:
            os.write(fd, b"R" * 100000)
        except OSError:
            pass
