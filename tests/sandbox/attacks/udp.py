# A datagram needs no connection.
# Expect: ok
# From: filter
import socket

try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"hello", ("127.0.0.1", TARGET["udp"]))
    print("ESCAPED sent")
except OSError as e:
    print(e)
