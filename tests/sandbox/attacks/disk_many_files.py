# Many files, each as large as it gets. Before there are namespaces, a watcher ends the call a little late.
# Expect: ok, disk
import time

total = 0
try:
    for i in range(10):
        with open(f"big{i}", "wb", buffering=0) as f:
            for _ in range(8):
                total += f.write(b"x" * (1 << 20))
except OSError as e:
    print(e)
time.sleep(0.4)
if total > 8 << 20:
    print("ESCAPED wrote", total)
