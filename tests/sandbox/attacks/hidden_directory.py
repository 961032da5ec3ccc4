# Directories whose owner may not look into them, to hide files from whoever counts and removes.
# Expect: ok, disk
import os
import time

os.mkdir("hidden", 0o300)
for i in range(10):
    try:
        with open(f"hidden/{i}", "wb", buffering=0) as f:
            f.write(b"x" * (1 << 20))
    except OSError as e:
        print(e)
os.mkdir("closed", 0)
time.sleep(0.3)
