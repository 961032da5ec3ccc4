# Recurse in Python.
# Expect: error
def f():
    f()


f()
