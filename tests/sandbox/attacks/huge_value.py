# A trailing expression whose repr is huge.
# Expect: ok
"x" * 5_000_000
