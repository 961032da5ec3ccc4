# Through the standard library.
# Expect: ok
# From: filter
import urllib.request

try:
    urllib.request.urlopen(f"http://127.0.0.1:{TARGET['tcp']}/", timeout=0.3)
    print("ESCAPED fetched")
except OSError as e:
    print(e)
