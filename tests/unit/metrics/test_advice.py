"""Each rule speaks at its bound, with the number and a setting that exists, and is silent below it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from stare_megatron.config import flatten, parse
from stare_megatron.config.describe import describe
from stare_megatron.config.loader import all_keys
from stare_megatron.metrics import catalogue, summary
from stare_megatron.metrics.advice import TOPICS, WINDOW, Settings, advise
from stare_megatron.metrics.console import ConsoleSink, work_lines

CALM = {
    "reward/mean": 0.4,
    "groups/sampled": 8.0,
    "groups/dropped": 1.0,
    "groups/zero_variance_kept": 0.0,
    "groups/all_correct": 0.8,
    "groups/none_correct": 0.4,
    "response/truncated": 0.01,
    "response/ungraded": 0.0,
    "response/failed": 0.0,
    "mismatch/mean": 0.004,
    "correction/bounded": 0.001,
    "update/grad_norm": 1.0,
    "stare/gate": 1.0,
    "policy/entropy": 0.3,
    "policy/target_entropy": 0.3,
    "time/step": 10.0,
    "time/rollout": 6.0,
    "time/update": 3.0,
    "time/score": 0.5,
    "time/push": 0.3,
    "time/save": 0.2,
    "engine/tail_seconds": 1.0,
    "engine/preemptions": 0.0,
    "engine/kv_use_max": 0.5,
    "idle/engines": 0.4,
    "sync/staleness_p95": 0.0,
    "rates/update_mfu": 0.4,
    "rates/score_mfu": 0.4,
}
STARE = Settings(weaker="raise algorithm.stare.weight_pos")
STREAM = Settings(mode="stream", max_staleness=2, corrected=True)

# topic, settings, what is unlike a calm run, what the sentence must hold; and the same just below the bound.
CASES = [
    (
        "ungraded",
        STARE,
        {"response/ungraded": 1.28},
        ["2 % of the responses", "reward.timeout"],
        {"response/ungraded": 1.0},
    ),
    ("ungraded", STARE, {"response/failed": 6.4}, ["10 % of the responses", "logs/"], {"response/failed": 1.0}),
    ("mismatch", STARE, {"mismatch/mean": 0.05}, ["0.050 nats", "algorithm.correction.mode"], {"mismatch/mean": 0.019}),
    ("mismatch", STREAM, {"correction/bounded": 0.06}, ["6 %", "sampling.max_staleness"], {"correction/bounded": 0.04}),
    ("gate", STARE, {"policy/entropy": 0.2}, ["last 20", "0.200", "weight_pos"], {"policy/entropy": 0.22}),
    (
        "gate",
        STARE,
        {"stare/gate": 0.0, "policy/entropy": 0.5},
        ["shut", "0.500", "algorithm.stare.target_entropy"],
        {"stare/gate": 0.0, "policy/entropy": 0.38},
    ),
    (
        "truncated",
        STARE,
        {"response/truncated": 0.31},
        ["31 %", "rollout.max_response_tokens"],
        {"response/truncated": 0.19},
    ),
    (
        "groups",
        STARE,
        {"groups/dropped": 4.8, "groups/all_correct": 4.64},
        ["60 %", "58 % solved", "harder prompts (data.train)"],
        {"groups/dropped": 3.9},
    ),
    (
        "groups",
        STARE,
        {"groups/zero_variance_kept": 4.0, "groups/none_correct": 4.0},
        ["easier prompts"],
        {"groups/zero_variance_kept": 2.5},
    ),
    (
        "tail",
        STARE,
        {"engine/tail_seconds": 5.4},
        ["sampling tail 54 % of the step", "sampling.mode"],
        {"engine/tail_seconds": 2.4},
    ),
    (
        "staleness",
        STREAM,
        {"sync/staleness_p95": 2.0},
        ["bound of 2", "40 %", "inference.engines"],
        {"sync/staleness_p95": 1.0},
    ),
    (
        "preemptions",
        STARE,
        {"engine/preemptions": 12.0, "engine/kv_use_max": 1.0},
        ["12 requests a step", "100 % full", "inference.vllm.gpu_memory_utilization"],
        {"engine/preemptions": 0.9},
    ),
    (
        "mfu",
        STARE,
        {"rates/update_mfu": 0.08},
        ["update takes 30 %", "8 %", "trainer.micro_batch_tokens"],
        {"rates/update_mfu": 0.16},
    ),
    ("mfu", STARE, {"rates/score_mfu": 0.05, "time/score": 2.5}, ["score takes 25 %"], {"rates/score_mfu": 0.05}),
    ("overhead", STARE, {"time/save": 2.5}, ["time/save is 25 %", "checkpoint.every"], {"time/save": 1.5}),
    ("overhead", STARE, {"time/push": 2.5}, ["time/push is 25 %", "sync.method"], {"time/push": 1.5}),
]


def rows(change, count=WINDOW):
    return [CALM | change | {"step": float(n + 1)} for n in range(count)]


@pytest.mark.parametrize(("topic", "settings", "change", "parts", "below"), CASES)
def test_a_rule_speaks_from_its_bound_on(topic, settings, change, parts, below):
    (advice,) = advise(rows(change), settings)
    assert advice.topic == topic
    for part in parts:
        assert part in advice.text
    assert "\n" not in advice.text
    assert advise(rows(below), settings) == []


def test_every_topic_has_a_case():
    assert {case[0] for case in CASES} | {"gradient"} == set(TOPICS)


def test_a_gradient_that_jumps_is_told_apart_from_one_that_is_large():
    quiet = rows({"update/grad_norm": 40.0})
    assert advise(quiet, STARE) == []
    quiet[-3]["update/grad_norm"] = 240.0
    (advice,) = advise(quiet, STARE)
    assert "reached 240, 6 times its median of 40" in advice.text


def test_only_the_newest_steps_count():
    assert advise([*rows({"response/truncated": 1.0}), *rows({})], STARE) == []
    assert advise(rows({"response/truncated": 1.0}, 4), STARE) == [], "four steps are too few"


def test_at_most_three_and_learning_before_time():
    bad = {"mismatch/mean": 0.1, "response/truncated": 0.5, "groups/dropped": 7.0, "engine/tail_seconds": 5.0}
    assert [a.topic for a in advise(rows(bad), STARE)] == ["mismatch", "truncated", "groups"]


def test_a_method_without_a_gate_hears_nothing_of_one():
    others = {"stare/gate": 0.0, "policy/target_entropy": math.nan, "policy/entropy": 2.0}
    assert advise(rows(others), Settings.of({"algorithm.method": "grpo_ds"})) == []


def test_metrics_that_are_missing_or_not_finite_say_nothing():
    assert advise([{"step": float(n)} for n in range(30)], STARE) == []
    assert advise(rows(dict.fromkeys(CALM, math.nan)), STARE) == []


def test_a_tail_is_only_what_the_trainer_waited_for():
    beside = {"engine/tail_seconds": 5.0, "time/rollout": 1.0}
    assert advise(rows(beside), Settings(mode="one_step", corrected=True)) == []


TREE = {
    "run": {"name": "u", "steps": 3},
    "model": {"path": "m"},
    "data": {"train": ["a"]},
    "reward": {"name": "math"},
}


def of(**tables):
    return Settings.of(flatten(parse(TREE | tables, "test").model_dump(mode="json")))


@pytest.mark.parametrize(
    ("stare", "named"),
    [
        ({}, ["weight_pos", "weight"]),
        ({"weight_pos": 3.0, "controller": "proportional"}, ["weight_pos"]),
        ({"weight_pos": 3.0, "controller": "proportional_integral"}, ["weight_pos"]),
        ({"adaptive": True}, ["weight_pos_max"]),
        ({"weight": "auto"}, ["weight_bound"]),
    ],
)
def test_a_weight_that_is_to_be_raised_is_one_that_the_controller_has(stare, named):
    weaker = of(algorithm={"stare": stare}).weaker
    assert re.findall(r"algorithm\.stare\.(\w+)", weaker) == named
    for key in named:
        settled = parse(TREE | {"algorithm": {"stare": stare | {key: "auto" if key == "weight" else 60.0}}}, "test")
        assert settled.algorithm.stare.idle() == ""


def test_settings_are_those_of_a_configuration():
    plain = of(rollout={"group_size": 4, "max_response_tokens": 100})
    assert (plain.mode, plain.group_size, plain.max_response_tokens, plain.corrected) == ("sync", 4, 100, False)
    assert of(algorithm={"method": "grpo"}).weaker == ""
    assert of(algorithm={"correction": {"mode": "truncate"}}).corrected


def test_what_is_named_exists():
    """Settings and metrics in the rules are those of the configuration and the catalogue."""
    said = " ".join(advise(rows(change), settings)[0].text for _, settings, change, _, _ in CASES)
    named = re.findall(
        r"\b(?:algorithm|checkpoint|data|inference|reward|rollout|sampling|sync|trainer)\.(?!md)[a-z_.]*[a-z]", said
    )
    assert len(named) > 10
    for key in named:
        if not key.startswith("inference.vllm."):
            assert key in all_keys(), key
            assert describe(key)
    for name in CALM:
        assert name in catalogue.CATALOGUE


def shown(width, settings, logged, quiet=False):
    """What the display has said after some steps; of a live one, its last frame."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=50, color_system=None)
    sink = ConsoleSink(console, Path("unit"), 40, 0, True, quiet, settings=settings)
    for n, row in enumerate(logged, 1):
        sink.log(n, catalogue.metrics({name: value for name, value in row.items() if name != "step"}))
    sink.close()
    text = out.getvalue()
    text = text if quiet else text[text.rindex("stare-megatron unit") :]
    return " ".join(text.replace("│", " ").split()), text


@pytest.mark.parametrize("width", [160, 80])
def test_a_live_display_shows_the_advice_of_now(width):
    slow = rows({"engine/tail_seconds": 5.4})
    words, text = shown(width, STARE, slow)
    assert "advice sampling tail 54 % of the step: engines run nearly empty" in words
    assert all(cell_len(line) <= width for line in text.splitlines()[1:])
    assert "advice" not in shown(width, STARE, [*slow, *rows({})])[0]


def test_without_a_display_advice_is_a_line_said_once():
    _, text = shown(120, STARE, rows({"response/truncated": 0.5}), quiet=True)
    assert text.count("advice: 50 % of the responses") == 1
    before, _, _ = text.partition("advice:")
    assert before.count("step ") == 5, "as soon as there are steps enough"


def test_engines_queue_and_staleness_are_shown_where_there_is_something_to_say():
    fleet = {"fleet/healthy": 3.0, "fleet/restarts": 1.0, "idle/engines": 0.25, "idle/trainers": 0.5}
    queue = {"queue/running": 12.0, "queue/ready": 4.0}
    stale = {"sync/staleness": 2.0, "sync/staleness_p95": 1.0, "sync/staleness_mean": 0.625}
    words, _ = shown(120, dataclasses.replace(STREAM, engines=4), rows(fleet | queue | stale))
    assert "engines 3 of 4 engines idle 25%, ranks 50%, 1 started again" in words
    assert "queue 12 groups 4 finished ones wait" in words
    assert "staleness 0.62 versions 95 % at most 1, the oldest 2 of 2" in words
    well = {"fleet/healthy": 1.0, "fleet/restarts": 0.0}
    assert work_lines(rows(well | queue | stale)[0], STARE) == []
    assert [label for label, _ in work_lines(rows(well | stale)[0], Settings(mode="one_step"))] == ["staleness"]
    words, _ = shown(200, STREAM, rows(stale | fleet), quiet=True)
    assert "stale 0.62 engines 3" in words


def test_the_summary_ends_with_it(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in rows({"response/truncated": 0.5}))
    (tmp_path / "metrics.jsonl").write_text(text)
    found = summary.summarize(tmp_path, STARE)
    assert [line[:21] for line in found.advice] == ["50 % of the responses"]
    out = io.StringIO()
    Console(file=out, width=200).print(summary.render(found, "unit", [], finished=True))
    assert "advice" in out.getvalue()
