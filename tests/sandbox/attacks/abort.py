# abort(3).
# Expect: killed
import os

os.abort()
