# Names carry secrets too.
# Expect: ok
# From: filter
import socket

socket.setdefaulttimeout(0.3)
for name in ("example.com", "secret.example.com"):
    try:
        print("ESCAPED resolved", socket.getaddrinfo(name, 80))
    except OSError as e:
        print(e)
