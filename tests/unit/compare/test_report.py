import base64
import json
import math
import statistics
import sys

import numpy as np
import pytest

from stare_megatron.__main__ import main
from stare_megatron.compare import derived, measures
from stare_megatron.compare.align import Align
from stare_megatron.compare.group import group
from stare_megatron.compare.html import number, render
from stare_megatron.compare.load import load_all
from stare_megatron.compare.report import Options, gather
from stare_megatron.compare.samples import read_samples
from stare_megatron.compare.series import encode
from stare_megatron.compare.stats import band
from stare_megatron.compare.viewer import trajectories
from stare_megatron.errors import UserError
from tests.unit.compare.run_folders import rows, write_run, write_sample_records

NOW = 2e9


@pytest.fixture
def two_methods(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / "runs", f"stare-s{seed}", seed, steps=80, evaluate=True)
    write_run(tmp_path / "runs", "grpo-s0", 0, steps=60, method="grpo")
    return tmp_path / "runs"


def test_the_table_is_made_of_the_metrics(two_methods):
    groups = group(load_all([two_methods], NOW))
    found, absent = measures.table(groups, last=10, reference=None)
    cells = {row.measure.key: dict(zip((g.label for g in groups), row.cells, strict=True)) for row in found}
    want = {f"stare-s{seed}": rows(seed, 80, "stare", evaluate=True) for seed in (0, 1, 2)}
    ends = {name: statistics.fmean(r["policy/entropy"] for r in made[-10:]) for name, made in want.items()}
    assert dict(cells["entropy_last"]["stare"].values) == pytest.approx(ends, rel=1e-12)
    assert cells["entropy_last"]["stare"].std == pytest.approx(statistics.stdev(ends.values()))
    share = band([r["policy/entropy"] for r in want["stare-s1"]], 0.2).share_in_band
    assert cells["share_in_band"]["stare"].values["stare-s1"] == share
    assert cells["eval/held_out/avg@8"]["stare"].values["stare-s2"] == want["stare-s2"][-1]["eval/held_out/avg@8"]
    solved = statistics.fmean(r["groups/all_correct"] / 40 for r in want["stare-s0"][-10:])
    assert cells["all_correct_last"]["stare"].values["stare-s0"] == pytest.approx(solved)
    assert cells["gate_duty"]["grpo"].n == 0, "GRPO has no gate: absent, not 0"
    assert cells["eval/held_out/avg@8"]["grpo"].n == 0
    assert absent == ["reflection words", "memory, driver"]


def test_a_reference_target_is_for_methods_without_one(two_methods):
    runs = load_all([two_methods], NOW)
    stare, grpo = runs[-1], runs[0]
    assert derived.target(stare, 0.5)[0] == 0.2
    assert derived.target(grpo, 0.5)[0] == 0.5
    assert derived.target(grpo, None)[0] == 0.2


def test_all_correct_fraction_of_no_groups_is_nothing(tmp_path):
    path = write_run(tmp_path, "a", steps=1)
    row = json.loads((path / "metrics.jsonl").read_text()) | {"groups/sampled": 0}
    (path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert math.isnan(derived.series(load_all([path], NOW)[0], "all_correct_fraction")[0])


@pytest.mark.parametrize(
    "values",
    [[1.0, 2.0, -3.0], [0.1, 1 / 3, 1e300], [0.5, 0.25, 0.0], [1e6, 2.0], [math.nan, 1.0], [math.inf, 1.0, 1.0],
     [0.0, 1.0, math.nan], [300.0, 2.0]],
)  # fmt: skip
def test_packed_series_are_exact(values):
    packed = encode(np.array(values))
    if "n" in packed:
        back = np.full(packed["n"], math.nan if packed["c"] is None else packed["c"])
    else:
        back = np.frombuffer(base64.b64decode(packed["b"]), "<" + packed["d"]).astype(float)
    assert np.array_equal(back, np.array(values), equal_nan=True)


def test_constants_are_packed_as_such():
    assert encode(np.full(3, 0.2)) == {"c": 0.2, "n": 3}
    assert encode(np.full(2, math.nan)) == {"c": None, "n": 2}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.94123, "fraction", "94.1 %"), (0.00012, "fraction", "0.012 %"), (200.0, "steps", "200"), (0.2, "nats", "0.2"),
     (0.18764, "nats", "0.1876"), (3.4e-7, "nats", "3.40e-07"), (12345.6, "tokens", "12,346"), (math.nan, "", "NaN")],
)  # fmt: skip
def test_numbers_for_reading(value, unit, text):
    assert number(value, unit) == text


def test_the_same_runs_give_the_same_report(two_methods):
    pages = [render(gather([two_methods], Options(), NOW)) for _ in range(2)]
    assert pages[0] == pages[1]
    # Plotly's own code holds addresses it never asks for; the rest of the page has none.
    text = pages[0].replace(_plotly(), "")
    assert "http://" not in text
    assert "https://" not in text


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def test_names_cannot_break_the_page(tmp_path):
    path = write_run(tmp_path, "a", steps=3)
    write_sample_records(path, 1, ["</script><b>bold</b> & more"])
    page = render(gather([path], Options(title="<i>t</i>"), NOW))
    assert r"\u003c/script>\u003cb>bold" in page
    assert "</script><b>bold" not in page
    assert "<h1>&lt;i&gt;t&lt;/i&gt;</h1>" in page


def test_samples(tmp_path):
    path = write_run(tmp_path, "a", steps=3)
    for step in (1, 10, 20, 30):
        write_sample_records(path, step, ["x"])
    found = read_samples(path, 3)
    assert [s.step for s in found] == [1, 20, 30]
    good, bad = found[0].samples
    assert (good.prompt, good.sample, good.reward) == ("p <i>", 0, 1.0)
    assert [(s.kind, s.pieces) for s in bad.spans] == [("prompt", ("What is",)), ("action", ("I", "", "é"))]
    assert (bad.answer, bad.note, bad.advantage) == ("42", "no answer", None)
    assert [[s.step for s in read_samples(path, n)] for n in (0, 1, 2, 9)] == [[], [30], [1, 30], [1, 10, 20, 30]]
    (path / "samples" / "step_x.jsonl").write_text("")
    with pytest.raises(UserError, match=r"step_x\.jsonl: not a file of samples"):
        read_samples(path, 9)


def test_samples_as_data(tmp_path):
    path = write_run(tmp_path, "a", steps=3)
    write_sample_records(path, 2, ["x", "\u2028", "y"])
    (data,) = read_samples(path, 9)
    assert (data.step, data.samples[0].advantage) == (2, 0.5)
    action = data.samples[0].spans[1]
    assert (action.kind, action.pieces, action.token_ids) == ("action", ("x", "\u2028", "y"), (100, 101, 102))
    assert action.columns["rollout_logprobs"][2] is None
    assert [span.versions for span in data.samples[0].spans] == [(), (0, 0, 0), (), (0, 0, 1, 1, 1, 1, 1)]
    assert [sample.facts.split(", ")[-2] for sample in data.samples] == ["policy versions 0 to 1", "policy version 0"]
    assert data.samples[0].turns[0].calls[0].outcome == "ok"
    file = path / "samples" / "step_000002.jsonl"
    line = json.loads(file.read_text().split("\n")[0])
    line["spans"][1]["pieces"].pop()
    file.write_text(json.dumps(line))
    with pytest.raises(UserError, match=r"step_000002\.jsonl:1: not a sample \(pieces: not one value for each of 3"):
        read_samples(path, 9)
    file.write_text("{}")
    with pytest.raises(UserError, match=r"step_000002\.jsonl:1: key 'spans' is missing"):
        read_samples(path, 9)


def test_the_newest_trajectories_are_kept_within_the_limit(tmp_path):
    path = write_run(tmp_path, "a", steps=3)
    for step in (1, 2):
        write_sample_records(path, step, ["x"] * 200)
    samples = {"a": read_samples(path, 9)}
    whole = trajectories(samples, {"a": 0})
    assert (whole["leftOut"], [s["step"] for s in whole["runs"][0]["steps"]]) == (0, [1, 2])
    half = trajectories(samples, {"a": 0}, limit=len(json.dumps(whole)) * 6 // 10)
    assert (half["leftOut"], [s["step"] for s in half["runs"][0]["steps"]]) == (2, [2])
    assert trajectories(samples, {"a": 0}, limit=10) == {"leftOut": 4, "runs": []}


def test_the_command_writes_all_of_it(two_methods, tmp_path, capsys):
    out, numbers = tmp_path / "out", tmp_path / "n.json"
    arguments = ["compare", str(two_methods), "--out", str(out), "--json", str(numbers), "--align", "tokens"]
    assert main([*arguments, "--verbose"]) == 0
    first, *printed = capsys.readouterr().out.splitlines()
    assert first == f"open {out / 'report.html'}"
    assert printed[0] == str(numbers)
    pictures = sorted(p.name for p in (out / "png").iterdir())
    assert {"overview.png", "policy_entropy.png", "eval_held_out_avg_at_8.png", "phases.png"} <= set(pictures)
    saved = json.loads(numbers.read_text())
    stare = next(g for g in saved["groups"] if g["label"] == "stare")
    end = rows(1, 80, "stare", evaluate=True)[-10:]
    value = stare["measures"]["reward_last"]["values"]["stare-s1"]
    assert value == pytest.approx(statistics.fmean(r["reward/mean"] for r in end), rel=1e-12)
    assert "gate_duty" not in {k for k, m in saved["groups"][0]["measures"].items() if m["n"]}
    assert saved["groups"][0]["measures"]["gate_duty"]["mean"] is None


def test_pictures_show_something_and_are_the_same_each_time(tmp_path, monkeypatch):
    from matplotlib.image import imread

    from stare_megatron.compare import png

    content = gather([write_run(tmp_path, "a", steps=60)], Options(align=Align.TIME, window=5), NOW)
    files = png.write_pngs(tmp_path / "png", content)
    assert len(files) > 15
    few = [
        panel for panel in png.panels(content.groups[0].runs, content.reference) if panel.key in png._OVERVIEW_PANELS
    ]
    monkeypatch.setattr(png, "panels", lambda *_: few)
    again = png.write_pngs(tmp_path / "again", content)
    assert len(again) == len(few) + 1 > 3
    assert [f.read_bytes() for f in again] == [(tmp_path / "png" / f.name).read_bytes() for f in again]
    for file in files:
        image = imread(file)[..., :3]
        coloured = (image.max(axis=2) - image.min(axis=2) > 0.2).mean()
        assert coloured > 0.001, f"{file.name} shows no curve"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--smooth", "0"], "--smooth 0: steps of the moving average"),
        (["--last", "0"], "--last 0"),
        (["--target", "-1"], "--target -1.0"),
        (["--samples", "-1"], "--samples -1"),
    ],
)
def test_options_out_of_range(two_methods, tmp_path, capsys, extra, message):
    assert main(["compare", str(two_methods), "--out", str(tmp_path / "out"), *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(two_methods, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["compare", str(two_methods), "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'}: cannot write" in capsys.readouterr().err


def test_the_tool_is_the_command(two_methods, tmp_path, monkeypatch):
    import runpy

    from tests.contracts.source import ROOT

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(two_methods), "--out", str(out), "--no-png"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "compare_runs.py"), run_name="__main__")
    assert stop.value.code == 0
    assert [p.name for p in out.iterdir()] == ["report.html"]
