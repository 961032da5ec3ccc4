"""The live page of a run: served, followed, and harmless to the run."""

from __future__ import annotations

import html.parser
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from stare_megatron.__main__ import main
from stare_megatron.compare import watch
from stare_megatron.compare.watch import Watcher
from stare_megatron.errors import UserError
from stare_megatron.host.pages import PageServer
from stare_megatron.metrics import events
from stare_megatron.types.report import RunEvent
from tests.unit.compare.run_folders import write_run, write_sample_records

NOW = 2e9


class Ids(html.parser.HTMLParser):
    """Ids of elements, titles and what is folded away."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.folded: set[str] = set()
        self._details = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs).get("id")
        self._details += tag == "details"
        if found:
            self.ids.add(found)
            if self._details:
                self.folded.add(found)

    def handle_endtag(self, tag: str) -> None:
        self._details -= tag == "details"


def state(watcher: Watcher) -> dict:
    return json.loads(watcher.answer("/state").body)


def add_step(run: Path, **values: float) -> None:
    rows = (run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(rows[-1])
    row |= {"step": row["step"] + 1} | values
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_the_page_shows_the_report_and_follows_it(tmp_path):
    run = write_run(tmp_path, "live <run>", steps=30)
    server = PageServer("127.0.0.1", 0, Watcher(run).answer)
    server.start()

    def get(path: str) -> str:
        with urllib.request.urlopen(server.url + path, timeout=120) as answer:
            return answer.read().decode()

    page, report, first = get("/"), get("/report?1"), json.loads(get("/state"))
    assert "<title>live &lt;run&gt;</title>" in page
    assert {"report", "about", "follow", "events"} <= Ids(page).ids
    assert {"plot-policy_entropy", "table", "run-facts"} <= Ids(report).ids
    assert "1 run, 30 steps" in report
    add_step(run)
    second = json.loads(get("/state"))
    assert first["version"] != second["version"]
    assert second["about"].startswith("step 31")
    assert "1 run, 31 steps" in get("/report")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/metrics.jsonl")
    server.stop()


def test_a_report_is_made_once_for_the_same_files(tmp_path, monkeypatch):
    run = write_run(tmp_path, "a", steps=5)
    made = []
    monkeypatch.setattr(watch, "render", lambda content: made.append(content) or "page")
    watcher = Watcher(run)
    watcher.answer("/state")
    assert made == [], "only who shows a report has it made"
    assert watcher.report() == watcher.report() == "page"
    assert len(made) == 1
    write_sample_records(run, 5, ["a", "b", "c"])
    watcher.report()
    assert len(made) == 2, "samples are part of it"


def test_a_run_before_its_first_step_and_a_torn_line(tmp_path):
    run = write_run(tmp_path, "a", steps=3)
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("")
    watcher = Watcher(run)
    assert "no step was logged yet" in watcher.report()
    assert state(watcher)["about"] == "no report yet"
    (run / "metrics.jsonl").write_text(whole + '{"step": 4, "rew')
    assert "1 run, 3 steps" in watcher.report()
    (run / "metrics.jsonl").unlink()
    assert "no metrics.jsonl" in watcher.report()


def test_a_run_that_stops_is_said_to_have_stopped(tmp_path):
    run = write_run(tmp_path, "a", steps=3)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("steps = 3", "steps = 60"))
    now = [os.stat(run / "metrics.jsonl").st_mtime + 5]
    watcher = Watcher(run, lambda: now[0])
    assert state(watcher)["about"] == "step 3 of 60, running"
    now[0] += 3600
    assert state(watcher)["about"] == "step 3 of 60, stopped"


def test_what_happened_to_processes_is_shown(tmp_path):
    run = write_run(tmp_path, "a", steps=3)
    tell = events.Events(run, lambda line: None)
    for n in range(7):
        tell(RunEvent(f"engine {n}", "", "HEALTHY", "DEAD", "killed"))
    tell.happened("run", "STOPPING", "an end is wanted")
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": "20')
    said = state(Watcher(run))["events"]
    assert len(said) == 5
    assert said[-2].endswith("engine 6: HEALTHY -> DEAD: killed")
    assert said[-1].endswith(" run: STOPPING: an end is wanted")


def test_the_report_of_one_run_has_its_advice_and_folds_the_shares(tmp_path):
    run = write_run(tmp_path, "a", steps=30)
    for _ in range(20):
        add_step(run, **{"response/truncated": 0.5})
    text = Watcher(run).report()
    page = Ids(text)
    assert "advice" in page.ids
    assert "50 % of the responses are cut off" in text
    shares = {f"plot-dynamics_tokens_{q}" for q in ("pos_likely", "neg_likely", "pos_unlikely", "neg_unlikely")}
    assert shares <= page.folded
    assert {"plot-policy_entropy", "plot-reward_mean"} <= page.ids - page.folded


def test_once_writes_the_report_and_nothing_into_the_run(tmp_path, capsys):
    run = write_run(tmp_path, "a", steps=5)
    before = sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*"))
    for out, file in (("page.html", "page.html"), ("folder", "folder/report.html")):
        assert main(["watch", str(run), "--once", str(tmp_path / out)]) == 0
        assert capsys.readouterr().out == f"open {tmp_path / file}\n"
        assert "1 run, 5 steps" in (tmp_path / file).read_text()
    assert sorted((file, file.stat().st_mtime_ns) for file in run.rglob("*")) == before


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "give the folder of one run" in capsys.readouterr().err
    run = write_run(tmp_path, "a", steps=5)
    server = PageServer("127.0.0.1", 0, Watcher(run).answer)
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}: cannot listen there on 127.0.0.1"):
        watch.watch(run, "127.0.0.1", port, print)
    server.close()


def test_it_serves_until_it_is_interrupted(tmp_path, monkeypatch):
    run = write_run(tmp_path, "a", steps=5)
    asked = threading.Event()

    def serve(server: PageServer) -> None:
        asked.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve", serve)
    said: list[str] = []
    watch.watch(run, "127.0.0.1", None, said.append)
    assert asked.is_set()
    assert said[0].startswith(f"watching {run} at http://127.0.0.1:")


def test_compare_has_a_place_for_its_report(tmp_path, capsys):
    write_run(tmp_path / "runs", "a", steps=5)
    write_run(tmp_path / "runs", "b", steps=5)
    assert main(["compare", str(tmp_path / "runs" / "a"), str(tmp_path / "runs" / "b"), "--no-png"]) == 0
    assert capsys.readouterr().out == f"open {tmp_path}/runs/a-report/report.html\n"
    assert (tmp_path / "runs" / "a-report" / "report.html").is_file()
