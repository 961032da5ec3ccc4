# The same by IPv6, and a listener of its own.
# Expect: ok
# From: filter
import socket

for attempt in (
    lambda: socket.create_connection(("::ffff:127.0.0.1", TARGET["tcp"]), timeout=0.3),
    lambda: socket.create_server(("0.0.0.0", 0)),
):
    try:
        attempt()
        print("ESCAPED a socket")
    except OSError as e:
        print(e)
