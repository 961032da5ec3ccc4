# The same through the interpreter.
# Expect: exited
import sys

print("all tests passed")
sys.exit(0)
assert False
