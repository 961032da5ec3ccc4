"""A save under way: how long its files take."""

from __future__ import annotations

import queue
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stare_megatron.host.manifest import FileEntry
from stare_megatron.trainer.writing import Writing


def test_a_save_takes_until_its_last_file_and_not_until_somebody_asks() -> None:
    pool = ThreadPoolExecutor(2)

    def write(seconds: float) -> Any:
        time.sleep(seconds)
        return "done", f"{seconds}.distcp", FileEntry(5, "00")

    began = time.monotonic()
    files = [pool.submit(write, seconds) for seconds in (0.2, 0.1)]
    results: Any = queue.SimpleQueue()
    writing = Writing(Path("none"), SimpleNamespace(finalize_fns=[]), results, pool, (), files, began=began)
    entries = writing.finish()
    took = time.monotonic() - began
    time.sleep(0.1)
    assert sorted(entries) == ["0.1.distcp", "0.2.distcp"]
    assert 0.2 <= writing.seconds <= took
    nothing = Writing(Path("none"), SimpleNamespace(finalize_fns=[]), results, pool, (), (), began=began)
    assert nothing.seconds == 0
