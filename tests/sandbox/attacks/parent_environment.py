# Variables of this process and of its parents.
# Expect: ok
# From: filter
import os

print(dict(os.environ))
for pid in (os.getppid(), TARGET["driver"], 1, "self"):
    try:
        print(open(f"/proc/{pid}/environ").read())
    except OSError as e:
        print(e)
