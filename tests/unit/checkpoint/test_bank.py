"""Shelves of finished groups: whole or not there, one to a checkpoint, and damage is told."""

from __future__ import annotations

import os

import pytest

from stare_megatron.checkpoint import Bank, Banked, shelf_name
from tests.unit.checkpoint.test_ahead import batch, same


def banked(seed: int) -> Banked:
    (group,) = batch().groups
    return Banked(seed, group, group.summary((2, 0)))


def test_a_group_comes_back_bit_for_bit(tmp_path):
    bank = Bank(tmp_path / "bank")
    assert not bank.has("", 7)
    shelf = shelf_name(40)
    assert not bank.has(shelf, 2**62 + 1)
    bank.put(shelf, banked(2**62 + 1))
    assert bank.has(shelf, 2**62 + 1)
    same(bank.take(shelf, 2**62 + 1), banked(2**62 + 1))
    assert [path.name for path in (tmp_path / "bank" / shelf).iterdir()] == [f"{2**62 + 1}.npz"]


def test_no_two_shelves_have_one_name_and_others_are_cleared(tmp_path):
    bank = Bank(tmp_path)
    shelves = [shelf_name(40) for _ in range(5)]
    assert len(set(shelves)) == 5
    for shelf in shelves:
        bank.put(shelf, banked(1))
    (tmp_path / "step_notes-mine").mkdir()  # of somebody else
    bank.clear(set(shelves[3:]))
    assert {path.name for path in tmp_path.iterdir()} == {*shelves[3:], "step_notes-mine"}


def test_what_is_half_written_is_not_there(tmp_path, monkeypatch):
    bank = Bank(tmp_path)
    shelf = shelf_name(2)

    def cut(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(OSError, match="power cut"):
        bank.put(shelf, banked(3))
    assert not bank.has(shelf, 3)


def test_damage_is_told(tmp_path):
    bank = Bank(tmp_path)
    shelf = shelf_name(2)
    bank.put(shelf, banked(3))
    file = tmp_path / shelf / "3.npz"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no zip", whole.replace(b'"seed"', b'"weed"')):
        file.write_bytes(damaged)
        with pytest.raises((OSError, ValueError)):
            bank.take(shelf, 3)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises((OSError, ValueError)):
        bank.take(shelf, 3)
    file.rename(file.with_name("4.npz"))
    (tmp_path / shelf / "4.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="of seed 3"):
        bank.take(shelf, 4)
