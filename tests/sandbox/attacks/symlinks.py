# Links in the scratch directory that lead out, for whoever cleans up or follows.
# Expect: ok
# From: landlock
import os

os.symlink(TARGET["open"], "way_out")
os.symlink(TARGET["public"], "file")
os.symlink("/", "root")
os.symlink("loop", "loop")
for path in ("way_out/written", "file", "root/etc/passwd", "root" + TARGET["public"]):
    for mode in ("r", "a"):
        try:
            print("ESCAPED", open(path, mode).name)
        except OSError as e:
            print(e)
