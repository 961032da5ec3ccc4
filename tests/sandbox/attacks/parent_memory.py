# Memory of the processes around.
# Expect: ok
# From: filter
import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), TARGET["driver"], TARGET["victim"]):
    for name in ("mem", "maps", "auxv", "syscall"):
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
            if os.read(fd, 100):
                print("ESCAPED read", name)
        except OSError as e:
            print(e)
    buffer = ctypes.create_string_buffer(64)
    pointers = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
    remote = (ctypes.c_void_p * 2)(0x400000, 64)
    if libc.process_vm_readv(pid, pointers, 1, remote, 1, 0) > 0:
        print("ESCAPED read memory of", pid)
