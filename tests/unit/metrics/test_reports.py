import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stare_megatron.config import parse
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.metrics import plot, summary
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.metrics.jsonl import JsonlSink
from stare_megatron.metrics.samples import choose, excerpt, pick, write_samples
from stare_megatron.types import QUADRANTS, Group, Prompt, Score, Span, SpanKind, Status, Trajectory


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    """As in an activated environment: commands are printed by their name alone."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def dynamics(step):
    """A step of which the update of the step before was predicted well, but for a factor of 50."""
    change = -0.01 / step
    values = {"dynamics/measured_change": change, "dynamics/predicted_change_before": 50 * change}
    for i, quadrant in enumerate(QUADRANTS):
        values |= {f"dynamics/tokens_{quadrant}": 0.1 * (i + 1), f"dynamics/change_{quadrant}": 0.25 * (-1) ** i}
    return values


def write_run(folder, steps, gate=True):
    sink = JsonlSink(folder / "metrics.jsonl", 0)
    for step in range(1, steps + 1):
        values = {
            "reward/mean": step / 100,
            "policy/entropy": 1.0 / step,
            "response/length_mean": 16.0,
            "mismatch/mean": step * 1e-7,
            "mismatch/max": 1e-5,
            "time/rollout": 0.5,
            "time/step": 1.5,
            "throughput/trained_tokens": 100,
            "memory/trainer_peak": 400.0,
            "memory/engine_peak": 900.0 + step,
        }
        if step > 1:
            values |= dynamics(step)
        if gate:
            values |= {"stare/gate": float(step % 2), "policy/target_entropy": 0.2}
        sink.log(step, metrics(values))
    sink.close()


@pytest.mark.parametrize(("steps", "gate"), [(1, True), (30, True), (30, False)])
def test_plot_draws_a_picture_with_something_in_every_panel(tmp_path, steps, gate):
    from matplotlib.image import imread

    write_run(tmp_path, steps, gate)
    file = plot.plot(tmp_path)
    assert file == tmp_path / "curves.png"
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    image = imread(file)[..., :3]
    height, width = image.shape[0] // 3, image.shape[1] // 3
    for row in range(3):
        for column in range(3):
            panel = image[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert (panel.min(axis=2) < 0.6).mean() > 0.001, f"panel {row},{column} is empty"


def test_plot_without_steps_says_so(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot read metrics: .*is .* the folder of a run"):
        plot.plot(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no step was logged yet"):
        plot.plot(tmp_path)


def test_plot_has_a_colour_for_every_quadrant():
    assert tuple(plot.QUADRANT_COLOURS) == tuple(QUADRANTS)


def test_prediction_is_drawn_at_the_size_of_what_was_measured():
    nan = float("nan")
    assert plot.scaled_to([3.0, -4.0, nan, 7.0], [0.03, -0.04, 1.0, nan]) == pytest.approx((0.01, 1.0))
    assert plot.scaled_to([1.0, 1.0], [2.0, -2.0]) == pytest.approx((2.0, 0.0))
    assert all(math.isnan(x) for x in plot.scaled_to([nan, 0.0], [1.0, 1.0]))


def test_summary_compares_the_first_and_last_ten_steps(tmp_path):
    write_run(tmp_path, 30)
    s = summary.summarize(tmp_path)
    assert (s.steps, s.window) == (30, 10)
    assert s.reward_first == pytest.approx(0.055)
    assert s.reward_last == pytest.approx(0.255)
    assert s.entropy_last == pytest.approx(sum(1 / i for i in range(21, 31)) / 10)
    assert s.gate_duty == 0.5
    assert s.mismatch_max_mean == pytest.approx(30e-7)
    assert s.seconds == 45.0
    assert s.trained_tokens == 3000
    assert s.engine_peak == 930.0


def test_summary_is_one_screen_and_lists_what_exists(tmp_path):
    write_run(tmp_path, 3)
    out = io.StringIO()
    paths = [("metrics", tmp_path / "metrics.jsonl"), ("wandb", tmp_path / "wandb")]
    Console(file=out, width=200).print(summary.render(summary.summarize(tmp_path), "unit", paths, finished=False))
    text = out.getvalue()
    assert "unit: interrupted" in text
    assert "0.010 -> 0.030 (+0.020; first and last 1 of 3 steps)" in text
    assert str(tmp_path / "metrics.jsonl") in text
    assert "wandb" not in text
    assert len(text.splitlines()) < 24


def configured(tmp_path, **tables):
    tree = {
        "run": {"name": "unit", "steps": 30, "dir": str(tmp_path)},
        "model": {"path": "m"},
        "data": {"train": ["a.jsonl"]},
        "reward": {"name": "math"},
    }
    return parse({key: tree.get(key, {}) | tables.get(key, {}) for key in tree | tables}, "test")


def test_a_start_says_what_is_about_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    config = configured(tmp_path, trainer={"world_size": 4, "tensor_parallel": 2}, rollout={"group_size": 8})
    said = summary.opening(config, 114752, 4096, {"aime24": 30})
    for part in ("m, 114,752 parameters", "no GPU found: running on the CPU", "4 ranks: TP 2, PP 1, CP 1, EP 1, DP 2"):
        assert part in said
    for part in ("engines    1, TP 1, colocated", "4,096 prompts", "aime24 (30)", str(tmp_path / "unit")):
        assert part in said


@pytest.mark.parametrize(
    ("kind", "placement", "method", "says"),
    [
        ("cpu", "colocated", "auto", "in shards"),
        ("cpu", "separate", "whole", "as whole tensors, by gloo"),
        ("cuda", "colocated", "auto", "as whole tensors, by cuda_ipc"),
        ("cuda", "separate", "auto", "as whole tensors, by nccl"),
        ("cuda", "separate", "sharded", "in shards"),
    ],
)
def test_a_start_says_how_weights_are_pushed(tmp_path, monkeypatch, kind, placement, method, says):
    monkeypatch.setattr(device, "current", lambda: device.Device(kind))
    config = configured(tmp_path, inference={"placement": placement}, sync={"method": method})
    assert f"weights    pushed {says} (sync.method)" in summary.opening(config, 114752, 4096, {})


def test_notes_of_a_start(tmp_path):
    config = configured(tmp_path, rollout={"prompts_per_step": 32}, checkpoint={"every": 0})
    few, unsaved = summary.opening_notes(config, 1, 0)
    assert "1 prompt, fewer than the 32 of a step (rollout.prompts_per_step)" in few
    assert unsaved.startswith("checkpoint.every = 0: nothing is saved before the last step")
    config = configured(tmp_path, rollout={"prompts_per_step": 32})
    assert summary.opening_notes(config, 32, 0) == []
    (dropped,) = summary.opening_notes(config, 40, 2)
    assert "2 of 42 prompts are longer than data.max_prompt_tokens = 1024" in dropped


def test_the_end_names_the_next_commands(tmp_path):
    config = configured(tmp_path, eval={"benchmarks": ["b.jsonl"]})
    run = config.folder
    done = summary.next_steps(config, finished=True)
    for command in (
        f"tensorboard --logdir {run}/tensorboard",
        f"wandb sync {run}/wandb/offline-run-*",
        f"stare-megatron compare {run}",
        f"stare-megatron eval {run}/config.toml --model {run}",
    ):
        assert command in done
    quiet = configured(tmp_path, logging={"tensorboard": False, "wandb": "disabled"})
    assert summary.next_steps(quiet, finished=True).splitlines() == [
        f"report     stare-megatron compare {run}",
        f"ask it     stare-megatron sample {run}",
        f"logs       {run}/logs",
        "saved      no checkpoint was saved",
        f"go on      stare-megatron train {run}/config.toml run.resume=auto run.steps=60",
    ]


def test_a_run_that_stopped_early_says_how_to_go_on(tmp_path):
    run = configured(tmp_path).folder
    none = summary.next_steps(configured(tmp_path), finished=False)
    assert none.endswith(
        f"saved      no checkpoint was saved\nstart over stare-megatron train {run}/config.toml run.resume=auto"
    )
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("step_000003\n")
    said = summary.next_steps(configured(tmp_path), finished=False)
    assert str(run / "checkpoints" / "step_000003") in said
    assert f"stare-megatron train {run}/config.toml run.resume=auto" in said


def group(name, rewards):
    prompt = Prompt(name, "unit", "1 + 1 =", (5, 6), "2")
    trajectories = tuple(
        Trajectory(
            name,
            i,
            (
                Span(SpanKind.PROMPT, np.array([5, 6], np.int32), np.zeros(0, np.float32)),
                Span(SpanKind.ACTION, np.array([10 + i], np.int32), np.zeros(1, np.float32)),
                Span(SpanKind.OBSERVATION, np.array([7], np.int32), np.zeros(0, np.float32)),
            ),
            Status.TRUNCATED,
            weight_versions=(3, 3),
            seed=i,
        )
        for i in range(len(rewards))
    )
    return Group(prompt, trajectories, tuple(Score(r, r == 1.0, "checked") for r in rewards))


def summaries(*rewards):
    return [group(str(i), own).summary() for i, own in enumerate(rewards)]


def test_successes_and_failures_are_shown_in_turn_and_of_different_groups():
    groups = summaries(*[(0.0, 1.0, 0.5)] * 32)
    for step in range(20):
        places = choose(groups, 6, step)
        assert [i for _, i in places] == [1, 0] * 3
        assert len({g for g, _ in places}) == 6
    assert len({choose(groups, 1, step)[0][0] for step in range(20)}) > 5, "always the same groups"
    assert choose(groups, 6, 3) == choose(groups, 6, 3)


@pytest.mark.parametrize("step", range(5))
def test_rare_failures_and_rare_successes_are_found(step):
    places = choose(summaries(*[(1.0, 1.0)] * 30, (1.0, 0.0)), 4, step)
    assert places[1] == (30, 1)
    places = choose(summaries(*[(0.0, 0.0)] * 30, (1.0, 0.0)), 4, step)
    assert places[0] == (30, 0)


def test_every_trajectory_is_chosen_once_when_there_is_room():
    places = choose(summaries((0.0, 0.5, 1.0), (1.0,), (0.0, 0.0)), 99, 1)
    assert sorted(places) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


def test_samples_say_how_many_they_are_taken_from(tmp_path):
    groups = {0: group("a", (0.0, 0.5, 1.0)), 4: group("b", (0.0, 0.0, 0.0))}
    picked = pick(groups, [(0, 2), (4, 0), (0, 0)])
    assert excerpt(picked[0], lambda ids: " ".join(map(str, ids))) == "a, reward 1: 5 6 12 7"
    assert excerpt(picked[0], lambda ids: "x" * 500, length=5) == "a, reward 1: ...xxxxx"
    file = write_samples(tmp_path / "samples", 10, picked, 6, 20, lambda ids: " ".join(f"<{i}>" for i in ids))
    assert file.name == "step_000010.txt"
    text = file.read_text()
    heads = [line for line in text.splitlines() if line.startswith("===")]
    assert heads == [
        "=== a sample 2: reward 1, correct, truncated, 1 action tokens, policy version 3, seed 2",
        "=== b sample 0: reward 0, wrong, truncated, 1 action tokens, policy version 3, seed 0",
        "=== a sample 0: reward 0, wrong, truncated, 1 action tokens, policy version 3, seed 0",
    ]
    assert text.startswith("step 10: 3 trajectories, the best and the worst of groups in turn, of the 6 in the update ")
    assert "batch; 20 were sampled since the one before\n" in text
    assert "--- prompt\n<5> <6>\n--- response\n<12>\n--- observation\n<7>\n--- answer\n2\n--- note\nchecked\n" in text
