# Bytecode that corrupts the interpreter.
# Expect: killed, error, timeout, exited, ok
# Seconds: 1
def f():
    pass


f.__code__ = f.__code__.replace(co_code=bytes([100, 255, 83, 0] * 50), co_consts=(), co_stacksize=0)
f()
