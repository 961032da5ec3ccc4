# What only root may read, at every level.
# Expect: ok
for path in ("/etc/shadow", "/root/.bash_history", "/root/.ssh/id_rsa", "/dev/mem", "/proc/1/mem", "/proc/1/environ"):
    try:
        open(path, "rb").read(1)
        print("ESCAPED read", path)
    except OSError as e:
        print(e)
