# Another name for a file outside.
# Expect: ok
import os

for path in (TARGET["private"], TARGET["public"], "/etc/passwd", "/proc/self/exe"):
    for follow in (True, False):
        try:
            os.link(path, "stolen", follow_symlinks=follow)
            print("ESCAPED linked", path, open("stolen").read())
        except (OSError, NotImplementedError) as e:
            print(e)
