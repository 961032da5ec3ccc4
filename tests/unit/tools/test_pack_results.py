import importlib.util
import json
import math

import pytest

from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl
from tests.contracts.source import ROOT

spec = importlib.util.spec_from_file_location("pack_results", ROOT / "tools/pack_results.py")
pack_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack_results)


def test_what_is_packed_reads_as_the_run_does(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": n, "policy/entropy": 0.5 / n} for n in range(1, 40)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "config.toml").write_text("[run]\nseed = 1\n")
    (run / "hf").mkdir()
    pack_results.pack(run, tmp_path / "out")
    assert jsonl.read(tmp_path / "out/metrics.jsonl.gz") == jsonl.read(run / "metrics.jsonl")
    first = (tmp_path / "out/metrics.jsonl.gz").read_bytes()
    pack_results.pack(run, tmp_path / "out")
    assert (tmp_path / "out/metrics.jsonl.gz").read_bytes() == first
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.toml", "metrics.jsonl.gz"]


def test_values_are_shortened_where_asked(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 1234567, "policy/entropy": 1 / 3, "sync/probe": float("nan"), "time/step": 1e-9 / 7}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_results.pack(run, tmp_path / "out", digits=4)
    (row,) = jsonl.read(tmp_path / "out/metrics.jsonl.gz")
    assert math.isnan(row.pop("sync/probe"))
    assert row == {"step": 1234567, "policy/entropy": 0.3333, "time/step": 1.429e-10}


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        pack_results.pack(tmp_path, tmp_path / "out")
