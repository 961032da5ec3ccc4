# Null bytes and lone surrogates in source.
# Expect: ok
for text in ("x = '\0'", "x = '\ud800'", "# -*- coding: utf-7 -*-\nx = 1", "\x0c" * 1000, "\\"):
    try:
        exec(text)
    except (SyntaxError, ValueError) as e:
        print(type(e).__name__)
