# A file that every user may read.
# Expect: ok
# From: landlock
import glob
import os

for path in (TARGET["public"], "/proc/self/root" + TARGET["public"], "/proc/self/cwd/../.." + TARGET["public"]):
    try:
        print(open(path).read())
    except OSError as e:
        print(e)
