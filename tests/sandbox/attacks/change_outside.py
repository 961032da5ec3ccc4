# Modes, times, owners, names and attributes of files outside.
# Expect: ok
import os

for path in (TARGET["private"], TARGET["public"]):
    for attempt in (
        lambda: os.chmod(path, 0o777),
        lambda: os.utime(path, (0, 0)),
        lambda: os.chown(path, os.getuid(), os.getgid()),
        lambda: os.rename(path, path + ".moved"),
        lambda: os.unlink(path),
        lambda: os.setxattr(path, "user.escaped", b"1"),
    ):
        try:
            attempt()
        except OSError as e:
            print(e)
