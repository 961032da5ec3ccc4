# Families that are no ordinary network.
# Expect: ok
# From: filter
import socket

for family, kind, protocol in (
    (socket.AF_INET, socket.SOCK_RAW, 1),
    (socket.AF_PACKET, socket.SOCK_RAW, 0),
    (socket.AF_NETLINK, socket.SOCK_RAW, 0),
    (socket.AF_ALG, socket.SOCK_SEQPACKET, 0),
    (40, socket.SOCK_STREAM, 0),
):
    try:
        socket.socket(family, kind, protocol)
        print("ESCAPED socket of family", family)
    except OSError as e:
        print(e)
