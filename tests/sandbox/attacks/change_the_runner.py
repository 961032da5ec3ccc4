# Replace what the runner uses after the code: streams, struct, os.write, repr. It fails alone.
# Expect: exited, error, tampered, timeout, ok
# Seconds: 1
import builtins
import os
import struct
import sys

runner = sys.modules["stare_megatron.sandbox.runner"]
runner._cell = None
runner.ANSWER = None
os.write = lambda *a: 0
struct.Struct.pack = None if False else struct.Struct.pack
builtins.repr = lambda x: "forged"
sys.stdout = sys.stderr = None
sys.modules.clear()
