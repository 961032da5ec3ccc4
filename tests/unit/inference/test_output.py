"""The exception that ended a process, found in what it wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from stare_megatron.inference.output import last_error

CORE = "(EngineCore pid=71) ERROR 11-28 15:04:20 [core.py:1510] "
WORKER = "(Worker_TP1 pid=73) ERROR 11-28 15:04:18 [multiproc_executor.py:953] "
AHEAD = "Traceback (most recent call last):"
FRAME = '  File "core.py", line 1, in start'


def lines(*texts: tuple[str, str]) -> list[str]:
    return [who + text for who, text in texts]


def test_the_cause_and_not_who_points_at_it() -> None:
    said = lines(
        (WORKER, AHEAD),
        (CORE, "EngineCore failed to start."),
        (WORKER, FRAME),
        (CORE, AHEAD),  # between those of the other
        (CORE, FRAME),
        (WORKER, "safetensors.SafetensorError: header too large"),
        (CORE, "Exception: WorkerProc initialization failed. See stack trace for root cause."),
        ("", AHEAD),
        ("", FRAME),
        ("", "    raise e from None"),
        ("", "RuntimeError: Engine core initialization failed. See root cause above."),
    )
    assert last_error(said) == "safetensors.SafetensorError: header too large"


def test_of_several_the_last_and_of_a_class_with_any_name() -> None:
    said = lines(("", AHEAD), ("", FRAME), ("", "ImportError: no fast path"), ("", AHEAD), ("", FRAME))
    assert last_error([*said, "triton.OutOfResources: shared memory", "ValueError: only a line"]) == (
        "triton.OutOfResources: shared memory"
    )
    assert last_error(["ValueError: no traceback before it", "all is well"]) == ""
    assert last_error(said) == "ImportError: no fast path"  # the second is not written to its end


_FAILS = """
import subprocess, sys
print("Traceback (most recent call last):\\n  old\\nKeyError: before", file=sys.stderr, flush=True)
from stare_megatron.inference.output import Output
output = Output()
assert output.error() == ""
assert output.explained("See root cause above.").startswith("See root cause above")
subprocess.run([sys.executable, "-c", "raise OSError('no room')"])
said = output.explained("See root cause above."), output.explained("ValueError: mine."), output.died()
print(*said, sep="\\n", file=open(sys.argv[1], "w"))
"""


def said(folder: Path, **streams: Any) -> list[str]:
    subprocess.run([sys.executable, "-c", _FAILS, folder / "said"], check=True, **streams)
    return (folder / "said").read_text().splitlines()


def test_a_file_is_read_from_where_it_was_and_named(tmp_path: Path) -> None:
    log = tmp_path / "engine_0.log"
    more = f"; its output is in {log}"
    expected = [f"OSError: no room{more}", f"ValueError: mine{more}", f"died, after OSError: no room{more}"]
    with log.open("a") as both:
        assert said(tmp_path, stdout=both, stderr=both) == expected
    log.unlink()
    with log.open("a") as errors:
        assert said(tmp_path, stdout=subprocess.PIPE, stderr=errors) == expected


def test_two_files_are_both_read(tmp_path: Path) -> None:
    with (tmp_path / "out").open("a") as out, (tmp_path / "err").open("a") as errors:
        assert said(tmp_path, stdout=out, stderr=errors)[0].startswith("OSError: no room; its output is in ")


def test_where_it_is_no_file_nothing_is_read(tmp_path: Path) -> None:
    assert said(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) == [
        *("See root cause above", "ValueError: mine", "died")
    ]
