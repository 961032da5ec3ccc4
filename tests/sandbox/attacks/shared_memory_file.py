# A file in /dev/shm, where processes meet.
# Expect: ok
# From: landlock
from multiprocessing import shared_memory

try:
    shared_memory.SharedMemory("escaped", create=True, size=4096)
except OSError as e:
    print(e)
