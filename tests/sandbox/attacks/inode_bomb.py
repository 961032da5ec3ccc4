# Empty files without end. Before there are namespaces, a watcher ends the call a little late.
# Expect: ok, disk
import time

made = 0
try:
    for i in range(5000):
        open(f"f{i}", "w").close()
        made += 1
        if made % 100 == 0:
            time.sleep(0.02)
except OSError as e:
    print(e)
time.sleep(0.4)
if made > 2500:
    print("ESCAPED made", made)
