# Handlers for everything that can be handled, then spin.
# Expect: timeout
# Seconds: 0.3
import signal

for number in signal.valid_signals():
    try:
        signal.signal(number, lambda *a: None)
    except (OSError, ValueError):
        pass
while True:
    pass
