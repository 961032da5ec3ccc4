"""What the tests of several machines share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that all machines see."""
    folder = Path(tempfile.mkdtemp(prefix="stare-cluster-", dir="/var/tmp"))
    make(default_settings("order_free_sum", layers=2, seed=1), folder / "material", 256, 8)
    yield folder
    shutil.rmtree(folder)
