# Threads without end.
# Expect: ok
import threading
import time

made = 0
for _ in range(50):
    try:
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        made += 1
    except RuntimeError:
        pass
if made:
    print("ESCAPED threads", made)
