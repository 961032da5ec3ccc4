# Files that the processes around have open.
# Expect: ok
# From: filter
import os

for pid in (os.getppid(), TARGET["driver"]):
    for fd in range(100):
        try:
            os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY)
            print("ESCAPED opened", pid, fd)
        except OSError:
            pass
