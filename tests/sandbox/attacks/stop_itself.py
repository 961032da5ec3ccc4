# SIGSTOP, so that no limit on CPU time is ever reached.
# Expect: timeout
# Seconds: 0.3
import os
import signal

os.kill(os.getpid(), signal.SIGSTOP)
