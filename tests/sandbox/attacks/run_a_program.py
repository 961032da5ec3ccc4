# subprocess, os.system, os.exec, posix_spawn.
# Expect: ok
import os
import subprocess

for start in (
    lambda: subprocess.run(["/bin/sh", "-c", "echo ESC''APED ran a shell"], check=True),
    lambda: os.system("echo ESC''APED ran a shell") and 1 / 0,
    lambda: os.posix_spawn("/bin/echo", ["echo", "ESCAPED spawned"], {}),
    lambda: os.popen("echo ESC''APED").read(),
):
    try:
        start()
    except (OSError, ZeroDivisionError):
        pass
