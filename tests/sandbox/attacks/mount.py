# Mount something, or unmount what hides something.
# Expect: ok
import ctypes

libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"proc", b".", b"proc", 0, None) == 0:
    print("ESCAPED mounted proc")
if libc.mount(b"/", b".", None, 4096, None) == 0:
    print("ESCAPED bound the root")
if libc.mount(None, b"/", None, 32 | 4096, None) == 0:
    print("ESCAPED remounted")
for path in (b"/scratch", b"/usr/lib", b"/"):
    if libc.umount2(path, 2) == 0:
        print("ESCAPED unmounted", path)
