"""Reading back what wandb wrote to disk: its log format by hand-made files, and a real offline run."""

import struct
import zlib

import pytest

from stare_megatron.compare.load import State, load
from stare_megatron.config import LoggingConfig
from stare_megatron.errors import UserError
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.metrics.wandb_log import read_log

BLOCK = 32 * 1024
HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)


def chunk(kind: int, data: bytes) -> bytes:
    return struct.pack("<IHB", zlib.crc32(bytes([kind]) + data), len(data), kind) + data


def write(records: list[bytes]) -> bytes:
    """The log of LevelDB: records cut into chunks at the ends of blocks."""
    out = HEADER
    for record in records:
        rest, first = record, True
        while first or rest:
            left = BLOCK - len(out) % BLOCK
            if left < 7:
                out += bytes(left)
                left = BLOCK
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (1 if not rest else 2) if first else (4 if not rest else 3)
            out += chunk(kind, part)
            first = False
    return out


@pytest.mark.parametrize("sizes", [[5, 0, 7], [BLOCK * 3], [100, BLOCK - 7 - 7 - 107 - 3, 50], [BLOCK - 14, 9], []])
def test_records_come_back(tmp_path, sizes):
    records = [bytes(i % 251 for i in range(size)) for size in sizes]
    file = tmp_path / "run-x.wandb"
    file.write_bytes(write(records))
    log = read_log(file)
    assert (log.records, log.torn) == (records, False)


@pytest.mark.parametrize("missing", [1, 4, 60, 93, 99])
def test_a_torn_tail_is_left_out(tmp_path, missing):
    file = tmp_path / "run-x.wandb"
    file.write_bytes(write([b"first", bytes(93)])[:-missing])
    log = read_log(file)
    assert (log.records, log.torn) == ([b"first"], True)


def test_damage_is_named(tmp_path):
    file = tmp_path / "run-x.wandb"
    data = bytearray(write([b"first", b"second"]))
    data[16] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"run-x\.wandb: damaged at byte 7"):
        read_log(file)
    file.write_bytes(b"not a run")
    with pytest.raises(UserError, match="not a wandb run file"):
        read_log(file)
    file.write_bytes(HEADER + chunk(3, b"middle") + chunk(1, b"x"))
    with pytest.raises(UserError, match="no beginning or no end"):
        read_log(file)
    with pytest.raises(UserError, match="cannot read the wandb run"):
        read_log(tmp_path / "none.wandb")


def test_a_real_offline_run_resumed_once(tmp_path):
    from stare_megatron.metrics.wandb import WandbSink

    config = {"run": {"name": "n", "seed": 4, "steps": 5}, "algorithm": {"method": "grpo"}}
    values = {1: 0.5, 2: 1 / 3, 3: float("nan")}
    sink = WandbSink(tmp_path / "wandb", LoggingConfig(), "n", config)
    for step, value in values.items():
        sink.log(step, metrics({"policy/entropy": value, "groups/sampled": 40}))
    sink.close()
    sink = WandbSink(tmp_path / "wandb", LoggingConfig(), "n", config)
    for step in (3, 4):
        sink.log(step, metrics({"policy/entropy": step / 10, "groups/sampled": 41}))
    sink.close()
    run = load(tmp_path / "wandb", 2e9)
    assert (run.name, run.state, run.planned) == ("n", State.STOPPED, 5)
    assert run.steps.tolist() == [1, 2, 3, 4], "the resumed start's step 3 counts"
    assert run.series["policy/entropy"].tolist() == [0.5, 1 / 3, 0.3, 0.4]
    assert run.series["groups/sampled"].tolist() == [40, 40, 41, 41]
    assert run.settings == {"run.name": "n", "run.seed": 4, "run.steps": 5, "algorithm.method": "grpo"}
    file = next((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert load(file, 2e9).name == "n"
