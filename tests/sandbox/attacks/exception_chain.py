# A chain of a hundred thousand exceptions.
# Expect: output, error, timeout, memory, killed
# Seconds: 1
e = None
for i in range(100000):
    new = ValueError(i)
    new.__cause__ = e
    e = new
raise e
