# Modules from the scratch directory in place of installed ones; it fools itself at most.
# Expect: ok, error
import sys

with open("colorsys.py", "w") as f:
    f.write("print('mine')")
sys.path.insert(0, "")
import colorsys
