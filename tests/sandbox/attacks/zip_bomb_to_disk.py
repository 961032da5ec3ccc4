# Decompress far more than the scratch directory.
# Expect: error, disk
import io
import zipfile

stream = io.BytesIO()
with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as z:
    z.writestr("zeros", b"\0" * (12 << 20))
with zipfile.ZipFile(stream) as z:
    z.extractall(".")
print("ESCAPED extracted")
