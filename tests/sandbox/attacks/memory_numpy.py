# Through a library's allocator.
# Expect: memory
import numpy

x = [numpy.ones((1 << 20,)) for _ in range(4096)]
