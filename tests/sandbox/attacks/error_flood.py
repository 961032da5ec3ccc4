# The same on stderr.
# Expect: output
import sys

while True:
    sys.stderr.write("x" * 1000)
