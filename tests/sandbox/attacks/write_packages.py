# The interpreter's own files, so that later processes run what it likes.
# Expect: ok
import os
import sys

import numpy

for path in (os.__file__, numpy.__file__, os.path.dirname(numpy.__file__) + "/escaped.py", sys.executable):
    for flags in (os.O_WRONLY, os.O_WRONLY | os.O_CREAT, os.O_RDWR | os.O_APPEND):
        try:
            os.open(path, flags)
            print("ESCAPED may write", path)
        except OSError as e:
            print(e)
