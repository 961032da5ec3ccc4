# atexit, finalisers, signal handlers, frozen exit.
# Expect: ok
import atexit
import signal
import time
import weakref

for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
    signal.signal(number, lambda *a: time.sleep(1000))


class Stay:
    def __del__(self):
        time.sleep(1000)


stay = Stay()
atexit.register(lambda: time.sleep(1000))
weakref.finalize(stay, lambda: time.sleep(1000))
