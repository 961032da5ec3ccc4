# The scratch directory of another call, by its name and by searching.
# Expect: ok
import os

paths = [TARGET["neighbour"], "/scratch", *TARGET["bases"]]
for base in paths:
    if not base:
        continue
    try:
        names = os.listdir(base)
    except OSError as e:
        print(e)
        names = []
    for path in [base + "/secret", *(f"{base}/{name}/secret" for name in names)]:
        try:
            print(open(path).read())
        except OSError as e:
            print(e)
