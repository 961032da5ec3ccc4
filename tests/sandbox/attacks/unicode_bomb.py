# Surrogates, controls, combining marks, direction marks, bytes that are no text.
# Expect: ok
import os

print("\ud800\udfff \x00\x1b[2J\u202e" + "e\u0301" * 1000 + "\ufdd0\U0010ffff")
os.write(1, bytes(range(256)) * 4)
os.write(2, b"\xff\xfe\xf8\x88\x80\x80\x80")
