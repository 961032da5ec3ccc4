"""Checksums of a folder's files: what is found, and how it is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from stare_megatron.errors import UserError
from stare_megatron.host import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 50_000)  # more than one block
    (tmp_path / "inner" / "b.json").write_text("{}")
    manifest.write(tmp_path)
    return tmp_path


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as e:
        manifest.verify(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_an_untouched_folder_passes(folder: Path) -> None:
    assert manifest.verify(folder)
    assert manifest.files(folder) == ["a.bin", "inner/b.json"]
    entries = manifest.read(folder)
    assert entries is not None
    assert entries["a.bin"].bytes == 256 * 50_000
    seen: list[int] = []
    manifest.verify(folder, progress=seen.append)
    assert sum(seen) == 256 * 50_000 + 2


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert manifest.read(tmp_path) is None
    assert not manifest.verify(tmp_path)


@pytest.mark.parametrize("position", [0, 5 << 20, 256 * 50_000 - 1])
def test_a_flipped_bit(folder: Path, position: int) -> None:
    data = bytearray((folder / "a.bin").read_bytes())
    data[position] ^= 1
    (folder / "a.bin").write_bytes(data)
    assert manifest.verify(folder, contents=False)
    said = refused(folder)
    assert "a.bin" in said
    assert "damaged" in said


def test_a_truncated_and_a_missing_file(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"short")
    assert "a.bin: truncated: 5 bytes, 12,800,000" in refused(folder)
    (folder / "a.bin").unlink()
    assert "a.bin: missing" in refused(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"algorithm": "xxh3_128"}', '{"algorithm": "crc32", "files": {}}'])
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_text(text)
    assert manifest.NAME in refused(folder)


def test_hashing_while_writing_is_hashing_afterwards(folder: Path) -> None:
    stream = io.BytesIO()
    writer = manifest.HashingWriter(stream)
    data = (folder / "a.bin").read_bytes()
    for start in range(0, len(data), 999_983):
        writer.write(memoryview(data)[start : start + 999_983])
    assert stream.getvalue() == data
    assert writer.entry() == manifest.checksum(folder / "a.bin")
    assert writer.tell() == len(data)
