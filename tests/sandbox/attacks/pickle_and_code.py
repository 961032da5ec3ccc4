# Objects that run code when they are loaded.
# Expect: ok
import os
import pickle


class Evil:
    def __reduce__(self):
        return os.system, ("echo ESC''APED",)


try:
    pickle.loads(pickle.dumps(Evil()))
except OSError as e:
    print(e)
