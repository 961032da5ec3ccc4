# In a kept state: answer for the cell that is to come.
# Expect: tampered, ok
import os

os.write(5, b"\0" * 16 + b"O" + b"\0" * 8)
# %%
print("second")
