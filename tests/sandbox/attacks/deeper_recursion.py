# Recurse until memory or the C stack is gone.
# Expect: memory, killed, error, timeout
# Seconds: 1
import sys

sys.setrecursionlimit(10**9)


class A:
    def __repr__(self):
        return repr(self)


def f():
    return [f()]


try:
    f()
except (RecursionError, MemoryError):
    pass
repr(A())
