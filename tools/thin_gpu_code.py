"""Empty the GPU machine code of other architectures in a shared library, so that it compresses to a fraction.

python tools/thin_gpu_code.py LIBRARY COPY 90,100
python tools/thin_gpu_code.py --list LIBRARY...

A library carries its kernels once per architecture, in containers that the driver searches for the GPU it has. What is
not wanted becomes zeros in place: headers, PTX, sizes and offsets stay, so the copy is as long as the library, loads as
it does, and serves the named architectures only. (An architecture is a compute capability without its point: 90 for
9.0. Code of a lower minor version serves too: with 89 that of 80 and 86 stays.)
Needs Python's standard library only.
"""

from __future__ import annotations

import argparse
import mmap
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SECTIONS = (b".nv_fatbin", b"__nv_relfatbin")
_NO_BITS = 8  # a section that takes no room in the file
_MAGIC = 0xBA55ED50  # begins a container
_ALIGNMENT = 8
_PTX, _CODE = 1, 2

Bytes = bytes | bytearray | mmap.mmap


class Malformed(ValueError):
    """A library whose tables do not fit into it."""


@dataclass(frozen=True)
class Entry:
    """One kernel image: `start` and `size` of its payload in the file, in bytes; `architecture`, 90 for 9.0."""

    start: int
    size: int
    is_code: bool
    architecture: int


@dataclass(frozen=True)
class Architecture:
    """Machine code of one architecture in a library: bytes in all, and bytes of images that are nothing but zeros."""

    number: int
    size: int
    emptied: int


def _sections(data: Bytes) -> Iterator[tuple[int, int]]:
    """(offset, size) of the sections with GPU code; none in what is no 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    width, count, names = struct.unpack_from("<HHH", data, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", data, table + i * width) for i in range(count)]
    for name, kind, _, _, offset, size in rows:
        at = rows[names][4] + name
        if kind != _NO_BITS and any(data[at : at + len(n) + 1] == n + b"\0" for n in _SECTIONS):
            yield offset, size


def entries(data: Bytes) -> Iterator[Entry]:
    """The kernel images of a library, in its order.

    Raises:
        Malformed: a table or an image reaches beyond the file.
    """
    try:
        for start, size in _sections(data):
            yield from _of_section(data, start, start + size)
    except struct.error as e:
        raise Malformed(f"a table reaches beyond the file ({e})") from e


def _of_section(data: Bytes, at: int, stop: int) -> Iterator[Entry]:
    while at + 16 <= stop:
        magic, _, header, length = struct.unpack_from("<IHHQ", data, at)
        if magic != _MAGIC:
            at += _ALIGNMENT
            continue
        image, end = at + header, at + header + length
        if end > stop:
            raise Malformed(f"the container at byte {at} ends at {end}, its section at {stop}")
        while image < end:
            kind, _, head, payload = struct.unpack_from("<HHIQ", data, image)
            (architecture,) = struct.unpack_from("<I", data, image + 28)
            if head < 32 or image + head + payload > end:
                raise Malformed(f"the image at byte {image} does not fit into its container")
            if kind in (_PTX, _CODE):
                yield Entry(image + head, payload, kind == _CODE, architecture)
            image += head + payload
        at = end


def serves(architecture: int, gpu: int) -> bool:
    """Whether a GPU of architecture `gpu` runs machine code of `architecture`: of its major version, none newer."""
    return architecture // 10 == gpu // 10 and architecture <= gpu


def thin(source: Path, target: Path, keep: frozenset[int]) -> int:
    """Write `source` to `target` without the machine code that serves none of the architectures `keep`; bytes that
    became zeros. A file without GPU code is copied.

    Raises:
        Malformed: see `entries`.
        OSError: a file cannot be read or written.
    """
    data = bytearray(source.read_bytes())
    emptied = 0
    for entry in list(entries(data)):
        if entry.is_code and not any(serves(entry.architecture, gpu) for gpu in keep):
            data[entry.start : entry.start + entry.size] = bytes(entry.size)
            emptied += entry.size
    target.write_bytes(data)
    return emptied


def architectures(library: Path) -> list[Architecture]:
    """What machine code a library has, by architecture; [] for a file without any.

    Raises:
        Malformed: see `entries`.
        OSError: it cannot be read.
    """
    if not library.stat().st_size:
        return []
    sizes: dict[int, list[int]] = {}
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for entry in entries(data):
            if entry.is_code:
                seen = sizes.setdefault(entry.architecture, [0, 0])
                seen[0] += entry.size
                seen[1] += entry.size * (data[entry.start : entry.start + entry.size] == bytes(entry.size))
    return [Architecture(number, *seen) for number, seen in sorted(sizes.items())]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the architectures of each library")
    parser.add_argument("words", nargs="+", metavar="LIBRARY [COPY ARCHITECTURES]")
    asked = parser.parse_args(argv)
    try:
        if asked.list:
            for name in asked.words:
                for a in architectures(Path(name)):
                    state = "emptied" if a.emptied == a.size else "whole" if not a.emptied else "partly emptied"
                    print(f"{name}: sm_{a.number} {a.size / 2**20:.1f} MiB, {state}")
            return 0
        if len(asked.words) != 3:
            parser.error("LIBRARY COPY ARCHITECTURES, or --list LIBRARY...")
        source, target, keep = asked.words
        emptied = thin(Path(source), Path(target), frozenset(int(a) for a in keep.split(",")))
    except (OSError, ValueError) as e:
        print(f"thin_gpu_code: {e}", file=sys.stderr)
        return 2
    print(f"{target}: emptied {emptied / 2**20:.1f} of {Path(target).stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
