# Move the scratch directory itself, or something into another directory.
# Expect: ok
# From: landlock
import os

here = os.getcwd()
open("thing", "w").close()
for source, target in (("thing", TARGET["open"] + "/thing"), (here, here + "-escaped"), ("thing", "../escaped")):
    try:
        os.rename(source, target)
        print("ESCAPED moved", source, target)
    except OSError as e:
        print(e)
