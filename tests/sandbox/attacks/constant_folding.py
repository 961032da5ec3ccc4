# Time spent before the first statement runs: in the compiler and its optimiser.
# Expect: timeout, memory, error, ok, killed
# Seconds: 1
exec("x = " + "+".join(["(1 << 10000)"] * 200000))
