"""What a study file resolves to, and when a run counts as done."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from stare_megatron.errors import UserError
from stare_megatron.metrics import jsonl
from stare_megatron.run.folder import to_toml
from stare_megatron.study import command, jobs, spec
from stare_megatron.study.display import line, table

BASE = """
[run]
steps = 5
[model]
path = "m"
[data]
train = ["t.jsonl"]
[reward]
name = "math"
"""
STUDY = """
base = "run.toml"
dir = "{dir}/study"
prepare = ["{{python}} make.py --out {{seed}}"]
seeds = [1, 2]
settings = ["model.path=models/{{seed}}"]

[variants.grpo]
title = "GRPO"
settings = ["algorithm.method=grpo"]

[variants.stare]
title = "STARE"
settings = ["algorithm.stare.fraction=0.03"]

[forms.quick]
seeds = [3]
variants = ["stare"]
settings = ["run.steps=2"]
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.toml").write_text(BASE)
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(dir=tmp_path))
    return path


def edit(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_every_variant_on_every_seed(file):
    study = spec.load(file, "")
    assert [j.name for j in study.jobs] == ["grpo-seed1", "stare-seed1", "grpo-seed2", "stare-seed2"]
    last = study.jobs[-1].config
    assert (last.run.seed, last.model.path, last.algorithm.stare.fraction) == (2, Path("models/2").absolute(), 0.03)
    assert study.prepare[2][0][1:] == ("make.py", "--out", "2")
    assert study.by_seed == ("model.path",)


def test_a_variant_has_commands_of_its_own_which_run_once(file):
    mine = 'prepare = ["{python} size.py --seed {seed}", "{python} make.py --out {seed}"]'
    edit(file, 'settings = ["algorithm.method=grpo"]', f'settings = ["algorithm.method=grpo"]\n{mine}')
    study = spec.load(file, "")
    assert [c[1:] for c in study.prepare[1]] == [("make.py", "--out", "1"), ("size.py", "--seed", "1")]
    assert len(spec.load(file, "", ["stare*"]).prepare[2]) == 1, "another variant does not need it"


def test_a_form_is_smaller_and_has_its_own_folder(file):
    study = spec.load(file, "quick")
    assert [(j.name, j.config.run.steps) for j in study.jobs] == [("stare-seed3", 2)]
    assert study.folder.name == "study-quick"
    assert [j.name for j in spec.load(file, "", ["grpo*"]).jobs] == ["grpo-seed1", "grpo-seed2"]
    assert [j.name for j in spec.load(file, "", ["grpo*2", "stare*1"]).jobs] == ["stare-seed1", "grpo-seed2"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            '"algorithm.method=grpo"',
            '"algorithm.methud=grpo"',
            r"study.toml: variant 'grpo': unknown key 'algorithm.methud'; did you mean 'algorithm.method'\?",
        ),
        ('"algorithm.method=grpo"', '"run.resume=auto"', "run.resume"),
        ("prepare =", "prepared =", r"study.toml: unknown key 'prepared'; did you mean 'prepare'\?"),
        ('title = "STARE"', 'titel = "STARE"', r"unknown key 'variants\.stare\.titel'; did you mean 'title'\?"),
        ('title = "STARE"', "", r"key 'variants\.stare\.title' is missing: How reports call it"),
        ("seeds = [1, 2]", "seeds = 1", r"seeds: must be a list"),
        ('variants = ["stare"]', 'variants = ["star"]', "star"),
        ('base = "run.toml"', 'base = "none.toml"', "none.toml"),
        ("seeds = [1, 2]", "seeds = []", "seeds"),
        ("seeds = [1, 2]", "seeds = [1", "TOML"),
    ],
)
def test_mistakes_stop_before_the_first_run(file, old, new, said):
    edit(file, old, new)
    with pytest.raises(UserError, match=said):
        spec.load(file, "")


def test_unknown_form_or_pattern(file):
    with pytest.raises(UserError, match="quick"):
        spec.load(file, "slow")
    with pytest.raises(UserError, match="xyz"):
        spec.load(file, "", ["xyz"])


def write(job, steps, exported=True):
    folder = job.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(to_toml(job.config))
    rows = [{"step": n + 1, "policy/entropy": 0.5, "reward/mean": 0.25, "time/step": 2.0} for n in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if exported:
        (folder / "hf").mkdir(exist_ok=True)
        (folder / "hf/config.json").write_text("{}")


def test_a_run_is_done_when_its_last_step_is_logged_and_its_policy_exported(file):
    job = spec.load(file, "").jobs[0]
    assert not jobs.is_done(jobs.Progress(job))
    write(job, 4)
    assert not jobs.is_done(jobs.Progress(job))
    write(job, 5, exported=False)
    shutil.rmtree(job.config.folder / "hf")
    assert not jobs.is_done(jobs.Progress(job))
    write(job, 5)
    assert jobs.is_done(jobs.Progress(job))


@pytest.mark.parametrize(("at_end", "every", "wanted"), [("true", 0, True), ("false", 5, True), ("false", 0, False)])
def test_a_run_is_not_done_before_its_last_evaluation(file, at_end, every, wanted):
    """Which a stop at the last step leaves out: steps, checkpoint and export are all there then."""
    evaluated = f'fraction=0.03", "eval.benchmarks=[\'e.jsonl\']", "eval.at_end={at_end}", "eval.every={every}"'
    edit(file, 'fraction=0.03"', evaluated)
    job = spec.load(file, "").jobs[1]
    write(job, 5)
    table = job.config.folder / "eval.jsonl"
    assert jobs.is_done(jobs.Progress(job)) is not wanted
    table.write_text('{"step": 0, "eval/e/avg": 0.5}\n')
    assert jobs.is_done(jobs.Progress(job)) is not wanted
    table.write_text('{"step": 0, "eval/e/avg": 0.5}\n{"step": 5, "eval/e/avg": 0.5}\n')
    assert jobs.is_done(jobs.Progress(job))


def test_a_folder_of_other_settings_is_refused(file):
    job = spec.load(file, "").jobs[1]
    write(job, 5)
    jobs.refuse_other(job)
    edit(file, "fraction=0.03", "fraction=0.1")
    with pytest.raises(UserError, match=r"stare-seed1.*algorithm.stare.fraction = 0.03, the study says 0.1"):
        jobs.refuse_other(spec.load(file, "").jobs[1])


def test_more_steps_go_on_with_the_same_run(file):
    job = spec.load(file, "").jobs[1]
    write(job, 5)
    edit(file, 'fraction=0.03"', 'fraction=0.03", "run.steps=9"')
    longer = spec.load(file, "").jobs[1]
    jobs.refuse_other(longer)
    assert not jobs.is_done(jobs.Progress(longer))


def test_what_the_user_sees(file):
    job = spec.load(file, "").jobs[0]
    write(job, 3)
    progress = jobs.Progress(job, jobs.State.RUNNING, rows=jsonl.read(job.config.folder / jsonl.FILE))
    assert line(progress) == "grpo-seed1: running, step 3/5, entropy 0.500, reward 0.250"
    assert table([progress]).row_count == 1


CTRL_C = """
import os, signal
os.kill({pid}, signal.SIGINT)  # as a terminal's Ctrl-C, which the command hears as well
raise SystemExit(130)
"""


def test_ctrl_c_in_a_command_of_prepare_starts_nothing(file, capsys):
    script = file.with_name("make.py")
    script.write_text(CTRL_C.format(pid=os.getpid()))
    edit(file, "make.py", str(script))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    try:
        code = command.run(file, form="", only=(), jobs=1, folder=None, dry_run=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert capsys.readouterr().out.splitlines()[-1] == "stopped: 0 of 4 runs are done; the same command goes on"
    assert not file.with_name("study").exists()


# A run that says that it waits for a Ctrl-C, and then ends as one that was interrupted.
WAITS = """
import signal, sys, time
def stop(*_):
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
print("waiting", flush=True)
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_goes_to_what_runs_and_the_next_run_does_not_start(file, tmp_path, monkeypatch, number):
    (tmp_path / "stare_megatron.py").write_text(WAITS)  # found first by `python -m` in this folder
    monkeypatch.chdir(tmp_path)
    edit(file, 'prepare = ["{python} make.py --out {seed}"]', "prepare = []")
    study, seen = spec.load(file, ""), []

    def show(progress):
        log = jobs.log_file(progress[0].job)
        if progress[0].state is jobs.State.RUNNING and log.read_text().strip() == "waiting":
            os.kill(os.getpid(), number)
        seen.append(progress[0].state)

    before = signal.signal(number, signal.SIG_DFL)
    try:
        progress = jobs.Runner(study, 1, show).run()
    finally:
        signal.signal(number, before)
    assert jobs.State.STOPPING in seen
    assert [p.state.name for p in progress] == ["STOPPED", "WAITING", "WAITING", "WAITING"]


def test_a_run_is_told_that_starts_while_ctrl_c_is_heard(file, tmp_path, monkeypatch):
    """Else it would run to its end."""
    (tmp_path / "stare_megatron.py").write_text(WAITS)
    monkeypatch.chdir(tmp_path)
    edit(file, 'prepare = ["{python} make.py --out {seed}"]', "prepare = []")
    popen = subprocess.Popen

    def start(*args, **named):
        process = popen(*args, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(jobs.subprocess, "Popen", start)
    progress = jobs.Runner(spec.load(file, ""), 2, lambda _: None).run()
    assert [p.state.name for p in progress] == ["STOPPED", "WAITING", "WAITING", "WAITING"]
