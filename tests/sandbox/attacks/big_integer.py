# Arithmetic that never ends.
# Expect: timeout, memory
# Seconds: 0.3
x = 9 ** 9 ** 9 ** 9
