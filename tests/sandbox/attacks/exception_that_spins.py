# An exception that never finishes showing itself.
# Expect: timeout
# Seconds: 0.3
class Evil(Exception):
    def __str__(self):
        while True:
            pass


raise Evil
