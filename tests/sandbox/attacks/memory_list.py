# Allocate until something gives.
# Expect: memory
x = []
while True:
    x.append(bytearray(1 << 20))
