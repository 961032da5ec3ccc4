# Take the machine's time from others.
# Expect: ok
# From: filter
import os

for name, attempt in (
    ("nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, -20)),
    ("scheduler", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))),
    ("affinity", lambda: os.sched_setaffinity(os.getppid(), {0})),
):
    try:
        attempt()
        print("ESCAPED", name)
    except OSError as e:
        print(e)
