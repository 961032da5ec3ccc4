"""What a run prints when nobody reads it any more."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

SCRIPT = """
import sys
from rich.console import Console
from stare_megatron.host.streams import outlive_readers

outlive_readers()
console = Console()
console.print("begun é", soft_wrap=True)
sys.stdin.readline()
for n in range(3):
    console.print("a line")
    print("another", file=sys.stderr)
print("not flushed yet")
open(sys.argv[1], "w").write("came to its end")
"""


def test_a_reader_behind_a_pipe_may_end_first(tmp_path):
    """As `tee` does at a terminal's Ctrl-C."""
    end = tmp_path / "end"
    words = [sys.executable, "-c", SCRIPT, str(end)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "begun é\n".encode()
    process.stdout.close()
    process.stdin.close()
    assert process.wait(600) == 0
    assert end.read_text() == "came to its end"


def test_a_terminal_may_be_closed(tmp_path):
    end, (master, slave) = tmp_path / "end", pty.openpty()
    words = [sys.executable, "-c", SCRIPT, str(end)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=slave, stderr=slave)
    os.close(slave)
    assert os.read(master, 100).decode() == "begun é\r\n"
    os.close(master)
    assert process.stdin
    process.stdin.close()
    assert process.wait(600) == 0
    assert end.read_text() == "came to its end"


def test_a_full_disk_is_none_of_it():
    words = [sys.executable, "-c", SCRIPT, os.devnull]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode
    assert "No space left on device" in done.stderr


INTERRUPTED = """
import os, signal, sys
from stare_megatron.host import streams

streams.outlive_readers()
inside = []

def heard(number, frame):
    print("note", flush=True)

signal.signal(signal.SIGUSR1, heard)

def traced(frame, event, arg):
    if not inside and frame.f_code is streams._Lasting.write.__code__:
        inside.append(1)
        os.kill(os.getpid(), signal.SIGUSR1)

sys.setprofile(traced)
print("a line", flush=True)
sys.setprofile(None)
assert inside
"""


def test_a_signals_handler_may_print_while_something_is_printed():
    """At the note of a Ctrl-C that comes while a step's line is written."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["a line", "note"]
