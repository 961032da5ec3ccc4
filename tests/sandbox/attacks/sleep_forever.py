# Use up the wall clock without using CPU.
# Expect: timeout
# Seconds: 0.3
import time

time.sleep(10**6)
