# Fork twice, leave the session, stay.
# Expect: ok
import os
import time

try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    print("ESCAPED forked")
except OSError as e:
    print(e)
