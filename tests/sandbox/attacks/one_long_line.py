# One line larger than any buffer.
# Expect: output
print("x" * 50_000_000)
