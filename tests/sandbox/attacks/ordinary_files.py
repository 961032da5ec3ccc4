# What ordinary code does with files still works.
# Expect: ok
import os
import shutil
import tempfile
from pathlib import Path

Path("a").mkdir()
Path("a/b.txt").write_text("text")
shutil.copy("a/b.txt", "c.txt")
shutil.copytree("a", "d")
shutil.rmtree("a")
with tempfile.NamedTemporaryFile("w+") as f:
    f.write("x")
with tempfile.TemporaryDirectory() as d:
    Path(d, "y").touch()
assert sorted(os.listdir()) == ["c.txt", "d"], os.listdir()
assert Path("d/b.txt").read_text() == "text"
