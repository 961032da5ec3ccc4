# Reopen one's own descriptors with other rights.
# Expect: ok
import os

for fd in range(16):
    for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_RDWR | os.O_NONBLOCK):
        try:
            again = os.open(f"/proc/self/fd/{fd}", flags)
            os.close(again)
        except OSError:
            pass
print("done")
