# Leases signal others, and locks block them.
# Expect: ok
import fcntl
import os

for path in (os.__file__, TARGET["public"]):
    try:
        fd = os.open(path, os.O_RDONLY)
        fcntl.fcntl(fd, 1024, fcntl.F_RDLCK)
        print("ESCAPED a lease on", path)
    except OSError as e:
        print(e)
