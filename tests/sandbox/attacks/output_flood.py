# Print without end.
# Expect: output
while True:
    print("x" * 1000)
