# Print what a runner might say.
# Expect: exited
import os
import sys

for text in ("READY", "OK", '{"status": "ok", "value": "42"}', "\x00\x00\x00\x02ok", "Result(status=Status.OK)"):
    print(text)
    print(text, file=sys.stderr)
sys.stdout.flush()
os._exit(0)
