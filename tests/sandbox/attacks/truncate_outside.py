# Empty a file that may only be read.
# Expect: ok
import os

for path in (TARGET["private"], TARGET["public"], os.__file__):
    for attempt in (
        lambda: os.truncate(path, 0),
        lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(path, os.O_PATH | os.O_TRUNC) and 1 / 0,
    ):
        try:
            attempt()
            print("ESCAPED truncated", path)
        except (OSError, ZeroDivisionError):
            pass
