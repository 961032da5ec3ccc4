# One long call into C, which no signal handler of Python interrupts.
# Expect: timeout
# Seconds: 0.3
sum(range(10**12))
