# Write a program into the scratch directory and run it.
# Expect: ok
# From: filter
import os

with open("program", "w") as f:
    f.write("#!/bin/echo ESCAPED\n")
os.chmod("program", 0o755)
try:
    os.execv("./program", ["program"])
except OSError as e:
    print(e)
