"""Shared libraries with GPU code, made up: the least of an ELF file that has a section of fat binaries."""

from __future__ import annotations

import struct

PTX, CODE = 1, 2
Image = tuple[int, int, bytes]  # kind, architecture, payload


def container(images: list[Image]) -> bytes:
    """As nvcc lays one out: a header of 16 bytes, images with headers of 64."""
    body = b"".join(
        struct.pack("<HHIQ", kind, 0x101, 64, len(payload)) + struct.pack("<QII", 0, 0, arch) + bytes(32) + payload
        for kind, arch, payload in images
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def library(containers: list[list[Image]], section: bytes = b".nv_fatbin", before: bytes = b"\x7fTEXT" * 11) -> bytes:
    """An ELF file whose `section` holds the containers, 8 bytes of zeros after each."""
    code = b"".join(c + bytes(-len(c) % 8 + 8) for c in map(container, containers))
    names = b"\0" + section + b"\0.shstrtab\0"
    start = 64 + len(before) + -len(before) % 8
    table = start + len(code) + len(names)
    header = bytearray(64)
    header[:6] = b"\x7fELF\x02\x01"
    struct.pack_into("<Q", header, 0x28, table)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 2)

    def row(name: int, kind: int, at: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, at, size, 0, 0, 0, 0)

    rows = row(0, 0, 0, 0) + row(1, 1, start, len(code)) + row(2 + len(section), 3, start + len(code), len(names))
    return bytes(header) + before.ljust(start - 64, b"\0") + code + names + rows
