# One file as large as it gets.
# Expect: ok, disk
total = 0
try:
    with open("big", "wb", buffering=0) as f:
        while True:
            total += f.write(b"x" * (1 << 20))
except OSError as e:
    print(e)
if total > 8 << 20:
    print("ESCAPED wrote", total)
