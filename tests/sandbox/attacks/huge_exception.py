# An exception whose message is huge.
# Expect: output
raise ValueError("x" * 20_000_000)
