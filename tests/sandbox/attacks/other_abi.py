# The 32-bit and x32 entrances, whose numbers mean other calls.
# Expect: killed, ok
# From: filter
import ctypes
import mmap
import platform

if platform.machine() == "x86_64":
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("b814000000cd80c3"))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    print("ESCAPED", ctypes.CFUNCTYPE(ctypes.c_int)(address)())
