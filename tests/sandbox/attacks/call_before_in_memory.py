# Code and output of other calls in the memory this process started with.
# Expect: ok
import ctypes
import gc

marks = ("CANARY" + "-", b"CANARY" + b"-")
mine = TARGET
for thing in gc.get_objects():
    if isinstance(thing, dict) and thing is not globals() and thing is not mine:
        for value in list(thing.values()):
            if isinstance(value, (str, bytes)) and len(value) < 200 and value[:7] in marks:
                print("found", value)
