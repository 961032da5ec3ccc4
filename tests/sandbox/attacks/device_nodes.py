# Make a disk of its own.
# Expect: ok
# From: filter
import os
import stat

for name, kind, device in (("disk", stat.S_IFBLK, (254, 0)), ("memory", stat.S_IFCHR, (1, 1)), ("fifo", stat.S_IFIFO, (0, 0))):
    try:
        os.mknod(name, kind | 0o666, os.makedev(*device))
        print("ESCAPED made", name)
    except OSError as e:
        print(e)
