# Signal every process one may, and the whole group.
# Expect: ok, killed
import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
for attempt in (
    lambda: os.kill(-1, signal.SIGTERM),
    lambda: os.killpg(0, signal.SIGTERM),
    lambda: os.kill(-1, signal.SIGKILL),
):
    try:
        attempt()
    except OSError as e:
        print(e)
