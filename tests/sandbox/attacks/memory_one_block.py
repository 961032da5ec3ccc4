# One allocation larger than the machine.
# Expect: memory
x = bytearray(1 << 45)
