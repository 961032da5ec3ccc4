# The classical way out of a root directory.
# Expect: ok
import os

os.mkdir("jail")
fd = os.open(".", os.O_RDONLY)
try:
    os.chroot("jail")
    os.fchdir(fd)
    for _ in range(20):
        os.chdir("..")
    os.chroot(".")
    print("ESCAPED", os.listdir("."))
except OSError as e:
    print(e)
