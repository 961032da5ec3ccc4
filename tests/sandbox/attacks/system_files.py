# Accounts, keys, logs, kernel.
# Expect: ok
# From: landlock
import os

for path in (
    "/etc/passwd",
    "/etc/shadow",
    "/etc/hostname",
    "/proc/cmdline",
    "/proc/self/mountinfo",
    "/proc/net/tcp",
    "/sys/kernel/notes",
    "/dev/mem",
    "/dev/kmsg",
    "/dev/sda",
    "/dev/vda",
    "/root",
    "/home",
    "/var/log",
    "/boot",
    "/",
):
    try:
        if os.path.isdir(path):
            names = os.listdir(path)
            if path != "/" or "scratch" not in names:
                print("ESCAPED listed", path)
        else:
            open(path, "rb").read(1)
            print("ESCAPED read", path)
    except OSError as e:
        print(e)
