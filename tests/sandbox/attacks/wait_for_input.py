# Read from an input that never comes: it ends at once instead.
# Expect: ok
import sys

print(repr(sys.stdin.read()))
