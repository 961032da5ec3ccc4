# Overwrite the interpreter's own objects through ctypes.
# Expect: killed, error, timeout, exited, ok
# Seconds: 1
import ctypes
import gc

for thing in gc.get_objects()[:2000]:
    ctypes.memset(id(thing), 0x41, 16)
gc.collect()
