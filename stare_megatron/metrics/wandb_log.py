"""The file format of wandb's offline runs, as bytes: a LevelDB log. What the records mean is in `wandb.py`.

A file is a header of 7 bytes and blocks of 32 KiB (the first includes the header). A block holds chunks: CRC-32 of
type and data (4 bytes), length (2), type (1), data; all little-endian. A record is one full chunk, or a first, any
number of middle ones and a last. What is too short for a chunk's head ends a block, as zeros.
Format: LevelDB, doc/log_format.md; wandb's differences are the file header and plain CRC-32.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.errors import UserError

_BLOCK = 32 * 1024
_FILE_HEAD = struct.Struct("<4sHB")
_CHUNK_HEAD = struct.Struct("<IHB")
_MAGIC = (b":W&B", 0xBEE1)
_VERSION = 0
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Log:
    """The records in order. `torn`: the last one was cut off in writing and is left out."""

    records: list[bytes]
    torn: bool


def read_log(file: Path) -> Log:
    """All whole records of a file that may still be written to.

    Raises:
        UserError: unreadable, of another format, or damaged before its end.
    """
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"{file}: cannot read the wandb run: {e.strerror}") from e
    if len(data) < _FILE_HEAD.size:
        return Log([], torn=True)
    name, magic, version = _FILE_HEAD.unpack_from(data)
    if (name, magic) != _MAGIC or version != _VERSION:
        raise UserError(f"{file}: not a wandb run file (its first bytes are {data[:7].hex()})")
    records: list[bytes] = []
    parts: list[bytes] = []
    at = _FILE_HEAD.size
    while at < len(data):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK_HEAD.size:
            at += left
            continue
        if at + _CHUNK_HEAD.size > len(data):
            return Log(records, torn=True)
        check, length, kind = _CHUNK_HEAD.unpack_from(data, at)
        chunk = data[at + _CHUNK_HEAD.size : at + _CHUNK_HEAD.size + length]
        if len(chunk) < length:
            return Log(records, torn=True)
        starts = kind in (_FULL, _FIRST)
        if zlib.crc32(bytes([kind]) + chunk) != check or kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            if at + _CHUNK_HEAD.size + length == len(data):
                return Log(records, torn=True)
            raise UserError(f"{file}: damaged at byte {at:,}; leave the run out, or use its metrics.jsonl")
        if starts != (not parts):
            raise UserError(f"{file}: the record at byte {at:,} has no beginning or no end; use metrics.jsonl")
        parts.append(chunk)
        if kind in (_FULL, _LAST):
            records.append(b"".join(parts))
            parts = []
        at += _CHUNK_HEAD.size + length
    return Log(records, torn=bool(parts))
