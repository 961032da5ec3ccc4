# Nest so deep that the parser overflows.
# Expect: ok, memory, killed, error
for text in ("(" * 100000, "-" * 100000 + "1", "[" * 90 + "]" * 90, "lambda: " * 5000 + "0", "1" + ".x" * 100000):
    try:
        compile(text, "deep", "exec")
    except (SyntaxError, MemoryError, RecursionError) as e:
        print(type(e).__name__)
