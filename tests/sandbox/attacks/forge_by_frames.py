# Look through frames and objects for the token of this call, without knowing the runner's format, and send it.
# Expect: tampered, exited
import gc
import os
import sys

found = set()
frame = sys._getframe()
while frame:
    found |= {v for v in frame.f_locals.values() if isinstance(v, bytes) and len(v) == 16}
    frame = frame.f_back
for thing in gc.get_objects():
    if isinstance(thing, tuple):
        found |= {v for v in thing if isinstance(v, bytes) and len(v) == 16}
for token in found:
    for fd in range(3, 16):
        try:
            os.write(fd, token + b"passed")
        except OSError:
            pass
os._exit(0)
