# Signal everything in sight.
# Expect: ok
import os
import signal

mine = os.getpid()
for pid in (os.getppid(), TARGET["driver"], TARGET["victim"], 1, mine - 1, mine + 1):
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        try:
            os.kill(pid, number)
            if pid not in (mine, 0):
                print("ESCAPED signalled", pid)
        except (OSError, OverflowError):
            pass
