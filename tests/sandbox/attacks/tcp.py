# Connect to this machine and beyond.
# Expect: ok
# From: filter
import socket

for address in (("127.0.0.1", TARGET["tcp"]), ("1.1.1.1", 53)):
    try:
        s = socket.create_connection(address, timeout=0.3)
        s.sendall(b"hello")
        print("ESCAPED connected to", address)
    except OSError as e:
        print(e)
