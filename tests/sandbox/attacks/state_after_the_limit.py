# In a kept state: what ran into a limit is gone.
# Expect: ok, timeout
# Seconds: 1
x = 1
# %%
while True:
    pass
# %%
print("ESCAPED the state is still there" if "x" in globals() else "fresh")
