# Climb out by directory descriptors.
# Expect: ok
# From: landlock
import os

fd = os.open(".", os.O_RDONLY)
for _ in range(20):
    try:
        fd = os.open("..", os.O_PATH, dir_fd=fd)
    except OSError as e:
        print(e)
        break
for path in (TARGET["public"][1:], "etc/passwd"):
    try:
        print("ESCAPED", os.read(os.open(path, os.O_RDONLY, dir_fd=fd), 100))
    except OSError as e:
        print(e)
