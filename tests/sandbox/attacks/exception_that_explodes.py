# An exception that cannot be shown, and says so by raising.
# Expect: error
class Evil(BaseException):
    def __str__(self):
        raise Evil

    __repr__ = __str__


raise Evil
