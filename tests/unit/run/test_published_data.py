"""A data set that is published and not here: the refusal names the command that makes its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from stare_megatron.errors import UserError
from stare_megatron.run import preflight


@pytest.mark.parametrize(
    ("given", "end"),
    [
        ("aime24", "prepare-data aime24 --out data/aime24.jsonl` makes one"),
        ("HuggingFaceH4/aime_2024", "prepare-data aime24 --out data/aime24.jsonl` makes one"),
        ("mine/math500.jsonl", "prepare-data math-500 --out mine/math500.jsonl` makes one"),
        ("my own.jsonl", "give the path of an existing file"),
        ("notes.txt", "want a file that ends in .jsonl, .json, .parquet, and there is none of this name"),
    ],
)
def test_a_missing_file(tmp_path, monkeypatch, given, end):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        preflight.check_files("eval.benchmarks", [Path.cwd() / given])
    assert str(e.value).startswith(f"eval.benchmarks: {tmp_path / given}: ")
    assert str(e.value).endswith(end)


def test_a_file_that_is_there_is_named_no_other(tmp_path):
    (tmp_path / "aime24.jsonl").write_text("")
    with pytest.raises(UserError, match=r"needs at least one row$"):
        preflight.check_files("data.train", [tmp_path / "aime24.jsonl"])
