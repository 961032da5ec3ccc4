"""What a run cost, read from its record; and which runs belong together."""

import json

import pytest

from stare_megatron.config import flatten
from stare_megatron.errors import UserError
from stare_megatron.run.rates import rates_of
from stare_megatron.scaling import records
from stare_megatron.scaling.cells import cells, cost, short
from stare_megatron.scaling.records import Axis
from stare_megatron.types import SequenceCost
from tests.configs import configuration
from tests.unit.scaling.synthetic import write_run

NOW = 2e9


def one(tmp_path, **record):
    run = write_run(tmp_path, "a-seed1", seed=1, parameters=30_560, accuracy=[0.1, 0.2, 0.3], **record)
    return run, records.read([run], "", NOW)[0]


def test_costs_are_sums_up_to_each_evaluation(tmp_path):
    _, trial = one(tmp_path)
    assert trial.steps.tolist() == [0, 10, 20]
    assert trial.accuracy.tolist() == [0.1, 0.2, 0.3]
    assert trial.cost[Axis.STEPS].tolist() == [0, 10, 20]
    assert trial.cost[Axis.TOKENS].tolist() == [0, 1000, 2000]
    # A step: 1 s of one engine, and half a second each of scoring and update on two ranks, at 1 TFLOP/s a device.
    assert trial.cost[Axis.FLOPS] == pytest.approx([0, 30e12, 60e12])
    # Two devices (colocated) for 2 s a step.
    assert trial.cost[Axis.HOURS] == pytest.approx([0, 40 / 3600, 80 / 3600])
    assert trial.se == pytest.approx(0.01, rel=1e-3)
    assert trial.gpu is False
    assert trial.in_band == 1.0


@pytest.mark.parametrize("engines", [{}, {"engines": 3}, {"engines": 2, "placement": "separate"}])
def test_devices_are_those_that_the_run_divided_its_rates_by(engines):
    config = configuration(trainer={"world_size": 2}, inference=engines)
    rates = rates_of(config, SequenceCost(linear=2.0, quadratic=0.0), 1e3)
    found = records.devices(flatten(config.model_dump(mode="json")))
    assert found == (rates.ranks, rates.workers, rates.devices)


def test_a_record_without_rates_has_no_flops_and_says_so(tmp_path):
    run, _ = one(tmp_path)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("rates/")} for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    trial = records.read([run], "", NOW)[0]
    with pytest.raises(UserError, match=r"--axis flops: .* axes it has: steps, hours, tokens"):
        cost(trial, Axis.FLOPS)
    assert cost(trial, Axis.TOKENS)[-1] == 2000


def test_a_record_that_begins_late_has_no_costs(tmp_path):
    run, _ = one(tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[5:]))
    trial = records.read([run], "", NOW)[0]
    assert not trial.cost
    assert any("begins at step 6" in note for note in trial.notes)


def test_a_run_without_evaluations_is_refused(tmp_path):
    run, _ = one(tmp_path)
    (run / "eval.jsonl").unlink()
    with pytest.raises(UserError, match="no evaluation in its record"):
        records.read([run], "", NOW)


def test_a_benchmark_is_named_or_known(tmp_path):
    run, _ = one(tmp_path)
    assert records.read([run], "test", NOW)[0].accuracy[-1] == 0.3
    with pytest.raises(UserError, match="aime: not evaluated; its benchmarks: test"):
        records.read([run], "aime", NOW)


def test_the_size_of_an_older_record_is_not_known(tmp_path):
    run, trial = one(tmp_path)
    assert trial.parameters == 30_560
    record = json.loads((run / "run.json").read_text())
    del record["starts"][0]["parameters"]
    (run / "run.json").write_text(json.dumps(record))
    trial = records.read([run], "", NOW)[0]
    assert trial.parameters is None
    assert trial.model == "30560/model", "without the seed"


def test_hours_of_gpus_are_named_so(tmp_path):
    _, trial = one(tmp_path, hardware="26 CPUs (x86_64), 200 GiB memory, 1 x NVIDIA H100 80GB HBM3")
    assert trial.gpu is True


def test_cells_are_methods_by_size_over_seeds(tmp_path):
    for method in ("grpo", "stare"):
        for parameters in (2000, 1000):
            for seed in (1, 2):
                name = f"{method}-{parameters}-{seed}"
                write_run(tmp_path, name, seed=seed, parameters=parameters, accuracy=[0.1, 0.2], method=method)
    found = cells(records.read([tmp_path], "", NOW))
    assert [(c.method, c.size, len(c.trials)) for c in found] == [
        ("grpo", "1k", 2), ("grpo", "2k", 2), ("stare", "1k", 2), ("stare", "2k", 2),
    ]  # fmt: skip
    points = found[0].points(Axis.STEPS, skip=0)
    assert points.x.tolist() == [0, 10, 0, 10]
    assert points.seed.tolist() == [0, 0, 1, 1]
    assert found[0].points(Axis.STEPS, skip=10).x.tolist() == [0, 0], "the start stays"


def test_a_seed_twice_is_refused_until_a_key_parts_them(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path, name, seed=1, parameters=1000, accuracy=[0.1, 0.2])
    text = (tmp_path / "b" / "config.toml").read_text()
    (tmp_path / "b" / "config.toml").write_text(text.replace("group_size = 8", "group_size = 16"))
    trials = records.read([tmp_path], "", NOW)
    with pytest.raises(UserError, match=r"two runs of one seed \(a, b\)"):
        cells(trials)
    assert [c.method for c in cells(trials, ["rollout.group_size"])] == ["grpo, group_size=8", "grpo, group_size=16"]


@pytest.mark.parametrize(("n", "text"), [(30_560, "30.6k"), (1_942_464, "1.94M"), (7_615_616_512, "7.62B"), (12, "12")])
def test_sizes_are_short(n, text):
    assert short(n) == text
