import io
import math

import numpy as np
import pytest
from rich.console import Console

from stare_megatron.errors import UserError
from stare_megatron.metrics import plot, summary
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.metrics.jsonl import JsonlSink
from stare_megatron.metrics.samples import pick, write_samples
from stare_megatron.types import QUADRANTS, Group, Prompt, Score, Span, SpanKind, Status, Trajectory


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
    Console(file=out, width=200).print(summary.render(summary.summarize(tmp_path), "unit", paths))
    text = out.getvalue()
    assert "0.010 -> 0.030 (+0.020; first and last 1 of 3 steps)" in text
    assert str(tmp_path / "metrics.jsonl") in text
    assert "wandb" not in text
    assert len(text.splitlines()) < 24


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
            weight_version=3,
            seed=i,
        )
        for i in range(len(rewards))
    )
    return Group(prompt, trajectories, tuple(Score(r, r == 1.0, "checked") for r in rewards))


def test_samples_show_best_then_worst_of_each_group(tmp_path):
    groups = [group("a", (0.0, 0.5, 1.0)), group("b", (0.0, 0.0, 0.0))]
    picked = pick(groups, 3)
    assert [p.place for p in picked] == [(0, 2), (1, 0), (0, 0)]
    file = write_samples(tmp_path / "samples", 10, picked, 6, lambda ids: " ".join(f"<{i}>" for i in ids))
    assert file.name == "step_000010.txt"
    text = file.read_text()
    heads = [line for line in text.splitlines() if line.startswith("===")]
    assert heads == [
        "=== a sample 2: reward 1, correct, truncated, 1 action tokens, policy version 3, seed 2",
        "=== b sample 0: reward 0, wrong, truncated, 1 action tokens, policy version 3, seed 0",
        "=== a sample 0: reward 0, wrong, truncated, 1 action tokens, policy version 3, seed 0",
    ]
    assert text.splitlines()[0] == "step 10: 3 of 6 trajectories"
    assert "--- prompt\n<5> <6>\n--- response\n<12>\n--- observation\n<7>\n--- answer\n2\n--- note\nchecked\n" in text
