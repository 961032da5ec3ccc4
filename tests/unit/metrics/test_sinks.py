import io
import json
import math
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from stare_megatron.config import Config
from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.metrics.console import ConsoleSink, clock, sparkline
from stare_megatron.metrics.jsonl import JsonlSink
from stare_megatron.metrics.samples import SampleRow
from stare_megatron.metrics.sinks import Sinks, open_sinks
from stare_megatron.metrics.tensorboard import TensorBoardSink
from tests.configs import configuration


def config(**logging) -> Config:
    return configuration(run={"steps": 10}, logging=logging)


def write_steps(path, first, last):
    sink = JsonlSink(path, first - 1)
    for step in range(first, last + 1):
        sink.log(step, metrics({"reward/mean": step / 10}))
    sink.close()


def test_jsonl_reads_back_what_was_logged(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl", 0)
    sink.log(1, metrics({"update/grad_norm": math.inf, "sync/probe": math.nan, "reward/mean": 0.5}))
    # Flushed before the sink is closed: a killed run keeps its steps.
    (row,) = jsonl.read(tmp_path / "m.jsonl")
    sink.close()
    assert row["step"] == 1
    assert row["update/grad_norm"] == math.inf
    assert math.isnan(row["sync/probe"])
    assert row["reward/mean"] == 0.5


def test_jsonl_resume_cuts_what_lies_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 6)
    before = path.read_text().splitlines()
    write_steps(path, 4, 5)
    assert [row["step"] for row in jsonl.read(path)] == [1, 2, 3, 4, 5]
    assert path.read_text().splitlines()[:3] == before[:3]


def test_jsonl_resume_drops_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, 1, 3)
    with path.open("a") as f:
        f.write('{"step": 4, "rew')
    write_steps(path, 4, 4)
    assert [row["step"] for row in jsonl.read(path)] == [1, 2, 3, 4]


def test_jsonl_damage_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"m\.jsonl:2: not a line of metrics"):
        jsonl.read(path)


def test_tensorboard_holds_every_scalar(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        first.log(step, metrics({"reward/mean": step / 10, "policy/entropy": 1.0}))
    first.close()
    seen = EventAccumulator(str(tmp_path)).Reload()
    assert set(seen.Tags()["scalars"]) == {"reward/mean", "policy/entropy"}
    assert [(e.step, round(e.value, 3)) for e in seen.Scalars("reward/mean")] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_tensorboard_resume_purges_steps_beyond_the_checkpoint(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    clocks = iter((1000, 2000))
    monkeypatch.setattr(event_file_writer.time, "time", lambda now=event_file_writer.time.time: now())
    for restored, value in ((0, 0.1), (1, 0.9)):
        # Event files are ordered by the second in their names.
        second = next(clocks)
        monkeypatch.setattr(event_file_writer.time, "time", lambda second=second: second)
        sink = TensorBoardSink(tmp_path, restored)
        for step in range(restored + 1, 4):
            sink.log(step, metrics({"reward/mean": value}))
        sink.close()
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("reward/mean")
    assert [(e.step, round(e.value, 3)) for e in scalars] == [(1, 0.1), (2, 0.9), (3, 0.9)]


def test_wandb_offline_keeps_one_id(tmp_path):
    from stare_megatron.metrics.wandb import WandbSink

    for _ in range(2):
        sink = WandbSink(tmp_path / "wandb", config().logging, "n", {"run": {"steps": 1}})
        sink.log(1, metrics({"reward/mean": 0.5}))
        sink.close()
    runs = [p for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run-")]
    name = (tmp_path / "wandb" / "run_id").read_text()
    assert len(runs) == 2
    files = [(run / f"run-{name}.wandb").read_bytes() for run in runs]
    assert all(files)
    assert any(b"reward/mean" in file for file in files)  # of two runs in one second wandb keeps one's values


ROWS = [
    SampleRow("p1", "1 + 1 =", " 2", "2", 1.0, True, "completed", 2),
    SampleRow("p2", "<a> | b\n=", " 3", "2", 0.0, False, "truncated", 5),
]


def test_tensorboard_has_samples_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path, 0)
    sink.samples(3, ROWS)
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("samples")
    assert event.step == 3
    assert events.SummaryMetadata("samples").plugin_data.plugin_name == "text"
    (text,) = event.tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[2:] == [
        "| p1 | 1 + 1 = | 2 | 2 | 1.0 | True | completed | 2 |",
        "| p2 | &lt;a> \\| b = | 3 | 2 | 0.0 | False | truncated | 5 |",
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_samples_are_a_table_where_wandb_samples_says_so(tmp_path, wanted):
    from stare_megatron.metrics.wandb import WandbSink

    sink = WandbSink(tmp_path / "wandb", config(wandb_samples=wanted).logging, "n", {})
    sink.samples(3, ROWS)
    sink.close()
    written = list((tmp_path / "wandb").rglob("*.table.json"))
    assert len(written) == int(wanted)
    if wanted:
        table = json.loads(written[0].read_text())
        assert table["columns"] == list(SampleRow._fields)
        assert table["data"] == [list(row) for row in ROWS]


def test_wandb_is_told_project_entity_group_tags_and_notes(tmp_path, monkeypatch):
    import wandb

    from stare_megatron.metrics.wandb import WandbSink

    told = {}

    def refuse(**kwargs):
        told.update(kwargs)
        raise wandb.Error("no API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    settings = config(
        wandb_project="p",
        wandb_entity="team",
        wandb_group="sweep",
        wandb_tags="first",
        wandb_notes="why",
        wandb_job_type="sweep",
        wandb_system=True,
    ).logging
    with pytest.raises(UserError, match="no API key configured; use"):
        WandbSink(tmp_path / "wandb", settings, "n", {})
    assert [told[key] for key in ("project", "entity", "group")] == ["p", "team", "sweep"]
    assert (told["tags"], told["notes"]) == (["first"], "why")
    assert told["job_type"] == "sweep"
    assert told["settings"].x_disable_stats is False, "wandb_system"


def test_open_sinks_writes_everywhere_and_closes(tmp_path):
    out = io.StringIO()
    sinks = open_sinks(config(wandb="disabled"), tmp_path, 0, False, Console(file=out, width=200))
    sinks.status("starting engines")
    sinks.status("rollout")
    values = {"reward/mean": 0.25, "policy/entropy": 0.4, "policy/target_entropy": 0.3, "stare/gate": 0.0}
    sinks.log(1, metrics(values), metrics({"time/save": 0.0}))
    sinks.complete(1, metrics({"time/save": 12.5}))
    sinks.close()
    assert out.getvalue().splitlines() == [
        "starting engines",
        "step 1/10  reward 0.250  entropy 0.400  target 0.300  gate 0",
    ]
    (row,) = jsonl.read(tmp_path / "metrics.jsonl")
    assert (row["reward/mean"], row["time/save"]) == (0.25, 12.5)
    assert list((tmp_path / "tensorboard").iterdir())
    assert not (tmp_path / "wandb").exists()


def test_a_line_is_amended_in_place(tmp_path):
    """Whatever the new values are: longer, or shorter than what they replace."""
    path = tmp_path / "m.jsonl"
    sink = JsonlSink(path, 0)
    for step, seconds in enumerate((1234.5678, 0.0, 5.25), start=1):
        sink.log(step, metrics({"reward/mean": step / 10, "time/save": 0.125, "time/eval": 0.0}))
        sink.amend(metrics({"time/save": seconds}))
        sink.amend(metrics({"time/eval": seconds}))
    sink.close()
    rows = jsonl.read(path)
    assert [(row["step"], row["time/save"], row["time/eval"]) for row in rows] == [
        (1, 1234.5678, 1234.5678),
        (2, 0.0, 0.0),
        (3, 5.25, 5.25),
    ]
    assert path.read_text().count("\n") == 3
    # A resumed run goes on behind it, and cuts whole lines.
    again = JsonlSink(path, 2)
    again.log(3, metrics({"reward/mean": 0.9}))
    again.close()
    assert [row["reward/mean"] for row in jsonl.read(path)] == [0.1, 0.2, 0.9]


def test_close_reaches_every_sink_when_one_fails():
    class Failing:
        def log(self, step, metrics): ...

        def close(self):
            raise OSError("disk gone")

    class Watched(Failing):
        closed = False

        def close(self):
            self.closed = True

    watched = Watched()
    console = ConsoleSink(Console(file=io.StringIO()), Path("unit"), 1, 0, False, quiet=True)
    with pytest.raises(OSError, match="disk gone"):
        Sinks(console, watched, [Failing(), Watched()]).close()
    assert watched.closed


def test_live_display_shows_progress_and_ends_clean():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, height=30, color_system=None)
    sink = ConsoleSink(console, Path("runs/unit"), 4, 0, True, quiet=False)
    sink.status("rollout")
    common = {"policy/target_entropy": 0.3, "time/step": 2.0}
    sink.log(1, metrics({"reward/mean": 0.1, "policy/entropy": 0.5, "stare/gate": 0.0} | common))
    sink.log(2, metrics({"reward/mean": 0.3, "policy/entropy": 0.2, "stare/gate": 1.0} | common))
    sink.close()
    last = out.getvalue()[out.getvalue().rindex("stare-megatron unit") :]
    for text in ("step 2/4", "0:04 left", "0.300", "gate open", "0.200", "no checkpoint yet", "▁█", "█▁"):
        assert text in last, text
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor must be shown again"


def test_a_step_of_a_stream_in_which_no_group_finished_shows_the_newest_values():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, height=30, color_system=None)
    sink = ConsoleSink(console, Path("unit"), 4, 0, False, quiet=False)
    sampled = {
        "reward/mean": 0.25,
        "reward/correct": 0.25,
        "response/length_mean": 40.0,
        "throughput/tokens_per_second": 300.0,
    }
    common = {"policy/entropy": 0.5, "mismatch/mean": 1e-4, "mismatch/max": 1e-3, "update/grad_norm": 1.0}
    sink.log(1, metrics(sampled | common | {"time/step": 2.0}))
    sink.log(2, metrics(common | {"throughput/tokens_per_second": 0.0, "time/step": 1.0}))
    sink.close()
    last = out.getvalue()[out.getvalue().rindex("stare-megatron unit") :]
    for text in ("0.250", "40 tokens", "200 tokens/s"):
        assert text in last, text
    assert "nan" not in last


@pytest.mark.parametrize("width", [160, 80, 50])
def test_curves_fit_the_terminal_and_keep_the_newest_steps(tmp_path, width):
    """Rendered as a terminal would: the last step's block stands at the right, at any width."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=40, color_system=None)
    sink = ConsoleSink(console, tmp_path, 200, 0, True, quiet=False)
    common = {"policy/target_entropy": 0.3, "stare/gate": 1.0, "throughput/tokens_per_second": 12345.0}
    for step in range(1, 121):
        # Flat but for the newest tenth.
        sink.log(step, metrics({"reward/mean": float(step > 108), "policy/entropy": 0.5} | common))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step_000100\n")
    sink.sample("p, reward 0: 1 + 1 = 3")
    sink.close()
    text = out.getvalue()
    last = text[text.rindex("stare-megatron ") :]
    (reward,) = [line for line in last.splitlines() if "reward  " in line]
    assert "…" not in last
    assert reward.rstrip(" │").endswith("█")
    assert all(cell_len(line) <= width for line in last.splitlines()[1:-1])
    said = " ".join(last.replace("│", " ").split())
    assert "last checkpoint step_000100" in said
    assert "sample p, reward 0: 1 + 1 = 3" in said


def test_quiet_never_starts_the_live_display():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, color_system=None)
    sink = ConsoleSink(console, Path("unit"), 4, 0, False, quiet=True)
    sink.log(1, metrics({"reward/mean": 0.1}))
    sink.close()
    assert out.getvalue() == "step 1/4  reward 0.100\n"


def test_sparkline_scales_averages_and_marks_non_finite():
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert sparkline([5.0, 5.0, 5.0], 10) == "▁▁▁"
    assert sparkline([0.0, 0.0, 7.0, 7.0], 2) == "▁█"
    assert sparkline([0.0, math.nan, 1.0], 10) == "▁?█"
    assert sparkline([], 10) == ""


def test_clock():
    assert (clock(0.2), clock(75), clock(3671)) == ("0:00", "1:15", "1:01:11")


def test_steps_that_are_done_again_stand_once(tmp_path):
    """Ranks were lost after step 5 and go on from step 2."""
    screen = Console(file=io.StringIO(), width=120)
    sinks = open_sinks(config(wandb="disabled"), tmp_path, 0, True, screen)
    for step in (1, 2, 3, 4, 5):
        sinks.log(step, metrics({"reward/mean": step / 10}), metrics({"time/save": 0.0}))
    sinks.rewind(2)
    for step in (3, 4):
        sinks.log(step, metrics({"reward/mean": step}), metrics({"time/save": 0.0}))
        sinks.complete(step, metrics({"time/save": 7.0}))
    sinks.close()
    rows = jsonl.read(tmp_path / jsonl.FILE)
    assert [(row["step"], row["reward/mean"], row["time/save"]) for row in rows] == [
        (1, 0.1, 0.0),
        (2, 0.2, 0.0),
        (3, 3.0, 7.0),
        (4, 4.0, 7.0),
    ]
    assert [row["reward/mean"] for row in sinks._console._rows] == [0.1, 0.2, 3.0, 4.0]


def test_nothing_is_left_of_a_run_that_begins_again(tmp_path):
    write_steps(tmp_path / jsonl.FILE, 1, 2)
    sink = JsonlSink(tmp_path / jsonl.FILE, 2)
    sink.rewind(0)
    sink.log(1, metrics({"reward/mean": 0.9}))
    sink.close()
    assert [row["reward/mean"] for row in jsonl.read(tmp_path / jsonl.FILE)] == [0.9]
