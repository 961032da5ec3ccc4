# Become another program.
# Expect: ok
# From: filter
import os

try:
    os.execv("/bin/echo", ["echo", "ESCAPED became echo"])
except OSError as e:
    print(e)
