# Catastrophic backtracking.
# Expect: timeout
# Seconds: 0.3
import re

re.match(r"(a+)+$", "a" * 64 + "b")
