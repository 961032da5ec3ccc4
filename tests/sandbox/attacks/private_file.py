# A file of the user that started everything.
# Expect: ok
try:
    print(open(TARGET["private"]).read())
except OSError as e:
    print(e)
