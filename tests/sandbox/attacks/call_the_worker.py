# Use the worker's own code and objects, which are in memory, to reach the worker.
# Expect: ok
import gc
import os
import sys

zygote = sys.modules["stare_megatron.sandbox.zygote"]
for thing in gc.get_objects():
    if type(thing).__name__ == "Zygote":
        try:
            thing._tell({"ended": "x", "status": 0, "cpu_ms": 0})
            thing._control.send(b"forged")
            print("ESCAPED spoke to the driver")
        except (OSError, AttributeError) as e:
            print(e)
        for pid in list(thing._names):
            try:
                os.kill(pid, 9)
            except OSError as e:
                print(e)
