"""Thinning: what is not wanted becomes zeros, all else stays byte for byte. tests/te does it to a library of nvcc's."""

import random

import pytest

from tests.unit.tools.elf import CODE, PTX, library
from tools import thin_gpu_code
from tools.thin_gpu_code import Malformed, architectures, entries, serves, thin


def payload(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


IMAGES = [
    [(CODE, 75, payload(1, 400)), (CODE, 90, payload(2, 128)), (PTX, 80, payload(3, 96))],
    [(CODE, 80, payload(4, 512)), (CODE, 86, payload(5, 64)), (CODE, 100, payload(6, 8))],
]


@pytest.mark.parametrize("section", [b".nv_fatbin", b"__nv_relfatbin"])
@pytest.mark.parametrize(
    ("keep", "left"),
    [({90}, {90}), ({90, 100}, {90, 100}), ({86}, {80, 86}), ({80}, {80}), ({89}, {80, 86}), ({103}, {100})],
)
def test_foreign_code_becomes_zeros(tmp_path, section, keep, left):
    source, target = tmp_path / "a.so", tmp_path / "b.so"
    source.write_bytes(library(IMAGES, section))
    emptied = thin(source, target, frozenset(keep))
    before, after = source.read_bytes(), target.read_bytes()
    assert len(after) == len(before)
    cleared = [e for e in entries(before) if e.is_code and e.architecture not in left]
    assert emptied == sum(e.size for e in cleared) > 0
    expected = bytearray(before)
    for e in cleared:
        expected[e.start : e.start + e.size] = bytes(e.size)
    assert after == expected
    found = {a.number: (a.size, a.emptied) for a in architectures(target)}
    assert {n for n, (size, gone) in found.items() if gone < size} == left
    assert all(gone in (0, size) for size, gone in found.values())


def test_every_image_is_seen(tmp_path):
    data = library(IMAGES)
    seen = [(e.is_code, e.architecture, data[e.start : e.start + e.size]) for e in entries(data)]
    assert seen == [(kind == CODE, arch, body) for images in IMAGES for kind, arch, body in images]


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x7fELF\x01\x01" + bytes(90), library([]), library(IMAGES, b".other")]
)
def test_files_without_gpu_code_are_copied(tmp_path, content):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(content)
    assert thin(source, target, frozenset({90})) == 0
    assert target.read_bytes() == content
    assert architectures(source) == []


def test_a_cut_library_is_refused(tmp_path):
    whole = library(IMAGES)
    source = tmp_path / "a.so"
    source.write_bytes(whole[:-100])
    with pytest.raises(Malformed):
        thin(source, tmp_path / "b.so", frozenset({90}))
    assert not (tmp_path / "b.so").exists()
    longer = bytearray(whole)
    at = whole.index(b"\x50\xed\x55\xba")
    longer[at + 8 : at + 16] = (10**6).to_bytes(8, "little")
    source.write_bytes(longer)
    with pytest.raises(Malformed, match="its section"):
        list(entries(source.read_bytes()))


def test_which_code_serves():
    assert [serves(a, 89) for a in (75, 80, 86, 89, 90)] == [False, True, True, True, False]
    assert [serves(a, 103) for a in (100, 103, 107, 120)] == [True, True, False, False]


def test_the_command(tmp_path, capsys):
    source, target = tmp_path / "a.so", tmp_path / "b.so"
    source.write_bytes(library(IMAGES))
    assert thin_gpu_code.main([str(source), str(target), "90"]) == 0
    assert thin_gpu_code.main(["--list", str(target)]) == 0
    out = capsys.readouterr().out
    assert "sm_75 0.0 MiB, emptied" in out
    assert "sm_90 0.0 MiB, whole" in out
    assert thin_gpu_code.main([str(tmp_path / "none"), str(target), "90"]) == 2
