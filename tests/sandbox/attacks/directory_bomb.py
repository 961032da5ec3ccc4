# Nested so deep that no path reaches the bottom and a recursive removal overflows.
# Expect: ok, disk
import os
import time

depth = 0
try:
    for _ in range(3000):
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
        depth += 1
except OSError as e:
    print(e)
time.sleep(0.3)
