# Decompress far more than memory.
# Expect: memory
import zlib

packed = zlib.compress(b"\0" * (16 << 20))
out = [zlib.decompress(packed) for _ in range(100)]
