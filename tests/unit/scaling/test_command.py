"""`stare-megatron scale` on run folders: the page, the numbers, and what it refuses."""

import json

import numpy as np
import pytest

from stare_megatron.__main__ import main
from stare_megatron.scaling import records
from stare_megatron.scaling.analysis import analyse
from stare_megatron.scaling.page import render
from stare_megatron.scaling.records import Axis
from tests.unit.scaling.synthetic import write_run

SIZES = (30_000, 100_000, 500_000, 2_000_000)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Four sizes of two methods on two seeds; larger ones end better. Made-up numbers."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(2)
    for method, gain in (("grpo", 0.0), ("stare", 0.02)):
        for i, parameters in enumerate(SIZES):
            for seed in (1, 2):
                top = 0.5 + 0.1 * i + gain
                curve = [0.05 + (top - 0.05) / (1 + (4 / s) ** 1.6) if s else 0.05 for s in range(21)]
                accuracy = [min(1.0, max(0.0, v + rng.normal(0, 0.004))) for v in curve]
                name = f"{method}-{parameters}-{seed}"
                write_run(
                    folder, name, seed=seed, parameters=parameters, accuracy=accuracy, method=method, tflops=i + 1
                )
    return folder


def numbers(tmp_path, *words):
    file = tmp_path / "numbers.json"
    assert main(["scale", *map(str, words), "--out", str(tmp_path / "out"), "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_the_numbers_are_those_of_the_runs(study, tmp_path, capsys):
    found = numbers(tmp_path, study)
    cell = found["cells"][0]
    assert (cell["method"], cell["parameters"], len(cell["runs"])) == ("grpo", 30_000, 2)
    lines = [json.loads(text) for text in (study / "grpo-30000-1" / "eval.jsonl").read_text().splitlines()]
    assert cell["runs"][0]["accuracy"] == [line["eval/avg"] for line in lines]
    assert cell["curve"]["a"]["value"] == pytest.approx(0.5, abs=0.03)
    assert cell["curve"]["a"]["low"] < 0.5 < cell["curve"]["a"]["high"]
    # 3 TFLOP a step, evaluated each ten steps, half of the gain at the fourth evaluation.
    assert cell["curve"]["mid"]["value"] == pytest.approx(4 * 30e12, rel=0.15)
    assert cell["held_out"]["rmse"] < 0.05
    assert cell["entropy"]["value"] == pytest.approx(0.2)
    laws = [law for law in found["laws"] if law["method"] == "grpo"]
    assert laws[0]["what"] == "1 - accuracy at the end"
    assert laws[0]["law"]["alpha"]["value"] > 0
    assert laws[0]["law"]["alpha"]["n"] == 4
    assert all(budget["cost"] > 0 for budget in found["budgets"])
    said = capsys.readouterr().out
    assert "grpo, 30k: 0.05" in said
    assert "held out: error 0.0" in said
    assert "open " in said


def test_no_number_is_beyond_the_evaluations(study, tmp_path):
    found = numbers(tmp_path, study)
    for budget in found["budgets"]:
        for cell, accuracy in zip(found["cells"], budget["accuracy"], strict=True):
            largest = min(run["cost"]["flops"][-1] for run in cell["runs"])
            assert (accuracy is None) == (budget["cost"] > largest)


def test_the_page_needs_nothing_else_and_holds_every_cell(study, tmp_path):
    numbers(tmp_path, study)
    page = (tmp_path / "out" / "scaling.html").read_text()
    for name in ("grpo, 30k", "stare, 2M", "core hours", "no GPU hours"):
        assert name in page
    assert "<script src" not in page
    assert "<link" not in page
    assert "default-src 'none'" in page
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    drawn = {figure["key"]: figure for figure in data["figures"]}
    assert {"curves-flops", "curves-tokens", "curves-steps", "curves-hours", "profile", "end", "reach"} <= set(drawn)
    assert len([t for t in drawn["curves-flops"]["traces"] if t["mode"] == "markers"]) == 16


def test_the_same_runs_give_the_same_page(study):
    trials = records.read([study], "", 2e9)
    assert render(analyse(trials, Axis.TOKENS, 0), "x") == render(analyse(trials, Axis.TOKENS, 0), "x")


def test_a_title_cannot_break_the_page(study):
    trials = records.read([study], "", 2e9)
    assert "<b>&" not in render(analyse(trials, Axis.STEPS, 0), "<b>&").split("<style>")[0]


def test_hours_of_a_cpu_are_no_gpu_hours(study, tmp_path):
    found = numbers(tmp_path, study, "--axis", "hours")
    assert found["axis"] == "hours"
    assert found["cells"][0]["runs"][0]["cost"]["hours"][-1] == pytest.approx(200 * 2 * 2 / 3600)


def test_skipped_steps_are_not_fitted(study):
    trials = records.read([study], "", 2e9)
    whole, part = analyse(trials, Axis.STEPS, 0), analyse(trials, Axis.STEPS, 50)
    assert len(whole.results[0].points.x) - len(part.results[0].points.x) == 2 * 5
    assert part.results[0].last == whole.results[0].last, "skipping changes fits alone"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["RUNS"], "--out FOLDER"),
        (["RUNS", "--out", "o", "--skip", "-1"], "--skip -1"),
        (["RUNS", "--out", "o", "--jobs", "2"], "are of a study file"),
        (["a.toml", "RUNS"], "one study file"),
        (["RUNS", "--out", "o", "--benchmark", "aime"], "aime: not evaluated"),
        (["nowhere", "--out", "o"], "no such folder"),
    ],
)
def test_what_cannot_be_done_is_said(study, words, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["scale", *(str(study) if word == "RUNS" else word for word in words)]) == 2
    assert text in capsys.readouterr().err


def test_a_study_file_is_planned_by_scale_too(capsys):
    assert main(["scale", "examples/scaling_cpu/study.toml", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert planned.count("run.seed=") == 16
    assert planned.count("algorithm.method=grpo") == 8
