"""Published files from the hub, as far as its local cache goes: no test here needs a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

from stare_megatron.data.prepare import hub
from stare_megatron.data.prepare.recipes import RECIPES

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"


def test_hub_files_are_chosen_by_the_first_pattern_that_matches():
    names = ["README.md", "main/test-00000-of-00001.parquet", "main/train-00000-of-00001.parquet", "socratic/x.parquet"]
    assert hub.choose(RECIPES["gsm8k"], names, "test") == ["main/test-00000-of-00001.parquet"]
    names = ["data/code-0.parquet", "data/math-1.parquet", "data/math-0.parquet"]
    assert hub.choose(RECIPES["skywork-or1"], names, "math") == ["data/math-0.parquet", "data/math-1.parquet"]
    assert hub.choose(RECIPES["deepscaler"], ["deepscaler.json", "dataset_infos.json"], "train") == ["deepscaler.json"]
    assert hub.choose(RECIPES["aime25"], ["README.md"], "test") == []


def offline(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, TOOL, *arguments]
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=300, env=environment)


def test_the_hubs_cache_is_read_without_a_network(tmp_path):
    commit = "a" * 40
    folder = tmp_path / "home" / "hub" / "datasets--math-ai--aime25"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "test.jsonl").write_text('{"problem": "2+3?", "answer": "5", "id": "0"}\n')
    done = offline(tmp_path / "home", "aime25", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["hub"] == f"math-ai/aime25@{commit}"
    done = offline(tmp_path / "home", "gsm8k", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 2
    assert "openai/gsm8k@main: cannot be fetched from the hub" in done.stderr
    assert "--file" in done.stderr
    assert len(done.stderr.splitlines()) == 1
