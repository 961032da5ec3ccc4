# Unix sockets without a file reach across directories.
# Expect: ok
# From: filter
import socket

try:
    s = socket.socket(socket.AF_UNIX)
    s.connect("\0" + TARGET["abstract"])
    print("ESCAPED connected")
except OSError as e:
    print(e)
