import gzip
import json
import math
import os

import numpy as np
import pytest

from stare_megatron.compare.align import Align, mean_curve, position
from stare_megatron.compare.group import differing, group
from stare_megatron.compare.load import State, load, load_all
from stare_megatron.compare.measures import table
from stare_megatron.errors import UserError
from stare_megatron.metrics.estimators import moving_average
from tests.unit.compare.run_folders import RECORD, rows, write_run

NOW = 2e9


def test_a_run_folder(tmp_path):
    run = load(write_run(tmp_path, "a", seed=3, steps=12), NOW)
    want = rows(3, 12, "stare")
    assert (run.name, run.planned, run.state, run.notes) == ("a", 12, State.FINISHED, ())
    assert run.steps.tolist() == list(range(1, 13))
    assert run.series["policy/entropy"].tolist() == [row["policy/entropy"] for row in want]
    assert math.isnan(run.series["dynamics/measured_change"][0])
    assert "response/reflections" not in run.series
    assert run.settings["algorithm.stare.target_entropy"] == 0.2
    assert (run.starts[0].commit, run.starts[0].hardware) == (RECORD["commit"], RECORD["hardware"])


def test_a_packed_run_is_the_same(tmp_path):
    plain, packed = load(write_run(tmp_path, "a"), NOW), load(write_run(tmp_path / "b", "a", packed=True), NOW)
    assert plain.series.keys() == packed.series.keys()
    for name, values in plain.series.items():
        assert np.array_equal(values, packed.series[name], equal_nan=True), name


def test_a_run_that_is_going_and_its_torn_line(tmp_path):
    path = write_run(tmp_path, "a", steps=40, done=7, tail='{"step": 8, "reward/mea')
    os.utime(path / "metrics.jsonl", (NOW - 60, NOW - 60))
    run = load(path, NOW)
    assert (run.steps[-1], run.state) == (7, State.RUNNING)
    assert run.notes == ("last line of the metrics was cut off: left out",)
    os.utime(path / "metrics.jsonl", (NOW - 86400, NOW - 86400))
    assert load(path, NOW).state is State.STOPPED


def test_only_metrics_are_needed(tmp_path):
    path = write_run(tmp_path, "a")
    (path / "config.toml").unlink()
    (path / "run.json").unlink()
    run = load(path, NOW)
    assert (run.name, run.state, run.planned, list(run.starts)) == ("a", State.UNKNOWN, None, [])
    assert run.notes == ("no config.toml: settings unknown",)


def test_gaps_are_told(tmp_path):
    path = write_run(tmp_path, "a", steps=9)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[2:4] + lines[6:]))
    assert load(path, NOW).notes == ("begins at step 3", "2 steps are missing")


def metrics(text: str):
    def damage(path):
        (path / "metrics.jsonl").write_text(text)

    return damage


def packed(data: bytes):
    def damage(path):
        (path / "metrics.jsonl").unlink()
        (path / "metrics.jsonl.gz").write_bytes(data)

    return damage


LINE = '{"step": 1, "reward/mean": 0.5}\n'


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (metrics(LINE + "nonsense\n" + LINE), r"metrics\.jsonl:2: not a line of metrics: "),
        (metrics('{"step": 1, "reward/mean": "high"}\n' + LINE), r"metrics\.jsonl:1: .*'reward/mean': 'high'"),
        (metrics('{"reward/mean": 1}\n' + LINE), r"metrics\.jsonl:1: .*no key 'step'"),
        (metrics("[1]\n" + LINE), r"metrics\.jsonl:1: .*not a JSON object"),
        (metrics(LINE + LINE), r"metrics\.jsonl:2: key 'step': 1 after 1; steps must rise"),
        (metrics(""), r"no step was logged yet"),
        (packed(b"plain"), r"metrics\.jsonl\.gz: not a gzip file"),
        (packed(gzip.compress(LINE.encode())[:-9]), r"metrics\.jsonl\.gz: the gzip file is cut off"),
        (packed(gzip.compress(b"\xff\xfe")), r"metrics\.jsonl\.gz: not text"),
        (lambda path: (path / "config.toml").write_text("[run"), r"config\.toml: not a configuration"),
        (lambda path: (path / "run.json").write_text("{}"), r"run\.json: key 'starts' is missing"),
        (lambda path: (path / "run.json").write_text("[]"), r"run\.json: not the record of a run"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    path = write_run(tmp_path, "a")
    damage(path)
    with pytest.raises(UserError, match=message):
        load(path, NOW)


def test_folders_of_runs(tmp_path):
    for name in ("b-s1", "b-s0"):
        write_run(tmp_path / "results", name, packed=name == "b-s1")
    write_run(tmp_path / "other", "b-s0")
    found = load_all([tmp_path / "results", tmp_path / "other" / "b-s0", tmp_path / "results" / "b-s0"], NOW)
    assert [run.name for run in found] == ["results/b-s0", "b-s1", "other/b-s0"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no metrics\.jsonl or metrics\.jsonl\.gz"):
        load_all([tmp_path / "empty"], NOW)
    with pytest.raises(UserError, match="none: no such folder"):
        load_all([tmp_path / "none"], NOW)
    (tmp_path / "results" / "b-eval" / "responses").mkdir(parents=True)  # beside runs, as `eval` leaves it: runs/*
    with pytest.raises(
        UserError, match=rf"b-eval: what `eval` found, no run; leave it out, or name .*, {tmp_path}/results:"
    ):
        load_all(sorted((tmp_path / "results").iterdir()), NOW)
    assert len(load_all([tmp_path / "results"], NOW)) == 2


def test_groups_are_runs_that_differ_in_their_seed(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, f"stare-s{seed}", seed)
        write_run(tmp_path, f"stare-w4-s{seed}", seed, weight_pos=4.0)
    write_run(tmp_path, "grpo", 0, method="grpo")
    groups = group(load_all([tmp_path], NOW))
    assert {g.label: len(g.runs) for g in groups} == {"grpo": 1, "stare": 3, "stare-w4": 3}
    unlike = differing(groups)
    assert unlike["algorithm.stare.weight_pos"] == [None, 8.0, 4.0]
    assert unlike["algorithm.method"] == ["grpo", "stare", "stare"]
    assert not {"run.name", "run.seed", "model.path"} & unlike.keys()
    merged = group(load_all([tmp_path], NOW), ignore=["algorithm.stare.weight_pos"])
    assert sorted(len(g.runs) for g in merged) == [1, 6]


def test_the_same_files_elsewhere_are_the_same_setting(tmp_path):
    for seed in (0, 1):
        path = write_run(tmp_path, f"a{seed}", seed)
        text = (path / "config.toml").read_text()
        (path / "config.toml").write_text(text.replace(".cache/demo", f"/somewhere/{seed}/demo"))
    assert [len(g.runs) for g in group(load_all([tmp_path], NOW))] == [2]
    text = (tmp_path / "a0" / "config.toml").read_text()
    (tmp_path / "a0" / "config.toml").write_text(text.replace("demo/model", "larger/model"))
    assert [len(g.runs) for g in group(load_all([tmp_path], NOW))] == [1, 1]


def test_runs_of_unknown_settings_are_not_put_together(tmp_path):
    for name in ("a", "b"):
        (write_run(tmp_path, name) / "config.toml").unlink()
    assert [g.label for g in group(load_all([tmp_path], NOW))] == ["a", "b"]


def test_positions(tmp_path):
    run = load(write_run(tmp_path, "a", steps=5), NOW)
    want = rows(0, 5, "stare")
    assert position(run, Align.STEP).tolist() == [1, 2, 3, 4, 5]
    assert position(run, Align.TOKENS).tolist() == [row["throughput/trained_tokens_total"] for row in want]
    minutes = [sum(row["time/step"] for row in want[: i + 1]) / 60 for i in range(5)]
    assert position(run, Align.TIME).tolist() == pytest.approx(minutes)
    path = write_run(tmp_path, "b", steps=2)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["time/step"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert position(load(path, NOW), Align.TIME) is None


def test_moving_average_looks_back_only_and_skips_what_is_not_finite():
    values = np.array([1.0, np.nan, 3.0, np.inf, 5.0])
    assert moving_average(values, 2).tolist() == [1.0, 1.0, 3.0, 3.0, 5.0]
    assert moving_average(values, 1) is values
    assert math.isnan(moving_average(np.array([np.nan, 1.0]), 3)[0])


def test_mean_by_step_only_where_all_runs_have_a_value():
    a = (np.array([1.0, 2, 3, 4]), np.array([1.0, 2, np.nan, 4]))
    b = (np.array([2.0, 3, 4, 5]), np.array([4.0, 5, 6, 7]))
    x, y = mean_curve([a, b], Align.STEP)
    assert (x.tolist(), y.tolist()) == ([2, 4], [3, 5])
    assert len(mean_curve([a, (np.array([1.0]), np.array([np.nan]))], Align.STEP)[0]) == 0


def test_mean_by_tokens_interpolates_where_all_runs_overlap():
    a = (np.array([0.0, 10, 20]), np.array([0.0, 10, 20]))
    b = (np.array([5.0, 25]), np.array([10.0, 30]))
    x, y = mean_curve([a, b], Align.TOKENS)
    assert x.tolist() == [5, 12.5, 20]
    assert y.tolist() == [7.5, 15, 22.5]
    assert len(mean_curve([a, (np.array([30.0, 40]), np.array([1.0, 1]))], Align.TIME)[0]) == 0


def test_evaluations_join_their_steps_and_change_nothing_else(tmp_path):
    plain, evaluated = write_run(tmp_path / "p", "a"), write_run(tmp_path / "e", "a")
    rows = [{"step": 0, "eval/test/avg@8": 0.1}, {"step": 10, "eval/test/avg@8": 0.4}]
    (evaluated / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    without, run = load_all([plain], NOW)[0], load_all([evaluated], NOW)[0]
    found = run.series["eval/test/avg@8"]
    assert [(s, v) for s, v in zip(run.steps, found, strict=True) if np.isfinite(v)] == [(10, 0.4)]
    tables = [table(group([r]), 10, None)[0] for r in (without, run)]
    cells = [{row.measure.key: row.cells[0].mean for row in t if row.cells[0].n} for t in tables]
    assert cells[1].pop("eval/test/avg@8") == 0.4
    assert cells[0] == cells[1]
