# Files outside the scratch directory.
# Expect: ok
# From: landlock
import os

for path in (TARGET["open"] + "/written", "/tmp/escaped", "/var/tmp/escaped", "/dev/shm/escaped", "../escaped"):
    try:
        with open(path, "w") as f:
            f.write("x")
        print("wrote", path)
    except OSError as e:
        print(e)
