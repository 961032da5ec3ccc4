# A directory swapped for a link: removal must not follow it.
# Expect: ok
import os

os.mkdir("a")
os.symlink(os.path.dirname(TARGET["private"]), "a/b")
os.symlink(TARGET["open"], "c")
os.symlink(TARGET["private"], "d")
