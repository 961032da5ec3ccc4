# A pair is allowed; sending from it to somebody else is not.
# Expect: ok
# From: filter
import socket

for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    try:
        a, b = socket.socketpair(socket.AF_UNIX, kind)
    except OSError as e:
        print(kind, e)
        continue
    for send in (
        lambda: a.sendto(b"hello", "\0" + TARGET["datagram"]),
        lambda: a.connect("\0" + TARGET["datagram"]),
        lambda: a.sendmsg([b"hello"], [], 0, "\0" + TARGET["datagram"]),
        lambda: a.bind("\0escaped"),
    ):
        try:
            send()
            print("ESCAPED sent")
        except OSError as e:
            print(kind, e)
