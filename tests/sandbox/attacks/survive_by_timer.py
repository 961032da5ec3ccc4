# In a kept state: work between the cells.
# Expect: ok
import signal


def work(*_):
    global ticks
    ticks += 1


ticks = 0
signal.signal(signal.SIGALRM, work)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
# %%
import time

if ticks > 300:
    print("ESCAPED worked between cells", ticks)
signal.setitimer(signal.ITIMER_REAL, 0)
