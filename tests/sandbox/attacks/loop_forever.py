# Spin.
# Expect: timeout
# Seconds: 0.3
while True:
    pass
