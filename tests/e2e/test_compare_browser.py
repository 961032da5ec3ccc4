"""The report in a real browser, from disk: what it shows is what the runs logged, on a desk and on a phone.

Needs Chromium and its driver (Debian: chromium, chromium-driver). Skipped where there is none, except under CI, which
must have it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time

import numpy as np
import pytest

from stare_megatron.compare import derived
from stare_megatron.compare.align import Align, mean_curve, position
from stare_megatron.compare.html import number
from stare_megatron.compare.load import load
from stare_megatron.compare.report import REPORT, Options, compare
from stare_megatron.errors import UserError
from stare_megatron.metrics.estimators import moving_average
from tests.unit.compare.run_folders import write_run, write_sample_records

STEPS, NOW = 70, 2e9
WIDTHS = (1400, 800, 390, 320)


def driver():
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    helper = shutil.which("chromedriver")
    if browser is None or helper is None:
        reason = "no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(helper))
    made.command_executor.client_config.timeout = 600
    made.set_script_timeout(400)
    return made


def require_fits(browser, width: int, elements: str) -> None:
    """Nothing scrolls sideways and none of `elements` is cut off, once the page has come to the width: what was wide
    stays so for a while, and figures are drawn again after that."""
    script = """
        const cut = [...document.querySelectorAll(arguments[0])]
            .filter((e) => e.tagName !== "OPTION" && e.getBoundingClientRect().right > innerWidth + 0.5)
            .map((e) => e.id || e.className || e.tagName);
        return [innerWidth, Math.max(document.scrollingElement.scrollWidth, innerWidth), cut];"""
    until = time.monotonic() + 120
    while (seen := browser.execute_script(script, elements)) != [width, width, []]:
        assert time.monotonic() < until, seen
        time.sleep(0.1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one method (one packed), one run of another that lacks a metric and was cut off."""
    folder = tmp_path_factory.mktemp("runs")
    made = [
        write_run(folder, "stare-s0", 0, STEPS, evaluate=True),
        write_run(folder, "stare-s1", 1, STEPS, evaluate=True, packed=True),
        write_run(folder, "grpo <b>", 0, STEPS, method="grpo", done=25, tail='{"step": 26, "rew'),
    ]
    file = made[2] / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()[:-1]]
    for line in lines:
        del line["update/grad_norm"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 26, "rew')
    write_sample_records(made[0], 10, ["</pre><script>alert(1)</script> ", "x" * 300])
    return made


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    """The browser with the report open and every plot drawn."""
    browser = driver()
    try:
        out = tmp_path_factory.mktemp("out")
        compare(runs, out, Options(png=False))
        resize(browser, WIDTHS[0])
        browser.get((out / REPORT).as_uri())
        draw(browser)
        yield browser
    finally:
        browser.quit()


def resize(browser, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def draw(browser, *keys: str) -> None:
    """Draw the panels that are out of date: those named, or all."""
    script = """
        const [keys, done] = arguments;
        drawAll(keys).then(() => done(null), (e) => done(String(e)));"""
    assert browser.execute_async_script(script, list(keys) or None) is None


def choose(browser, identity: str, value: str, *keys: str) -> None:
    script = """
        const element = document.getElementById(arguments[0]);
        element.value = arguments[1];
        element.dispatchEvent(new Event("change"));"""
    browser.execute_script(script, identity, value)
    draw(browser, *keys)


def traces(browser, key: str) -> list[dict]:
    """The curves Plotly was given: name, kind (run, mean, band), x and y."""
    script = """
        const plain = (v) => Array.from(v, (n) => (Number.isFinite(n) ? n : null));
        return document.getElementById("plot-" + arguments[0]).data
            .map((t) => ({name: t.name, kind: t.meta, x: plain(t.x), y: plain(t.y)}));"""
    return browser.execute_script(script, key)


def as_plotted(values) -> list[float | None]:
    return [float(v) if math.isfinite(v) else None for v in values]


def logged(run) -> list[dict[str, float]]:
    """The file's own numbers, read by nothing of the package."""
    import gzip

    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else gzip.decompress((run / "metrics.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def cell(browser, measure: str, group: int) -> dict:
    script = """
        const td = document.querySelectorAll(`#table tr[data-measure="${arguments[0]}"] td`)[arguments[1]];
        const value = (s) => [s.dataset.run, [Number(s.dataset.value), s.innerText]];
        const each = [...td.querySelectorAll("[data-run]")].map(value);
        return {...td.dataset, text: td.innerText, each: Object.fromEntries(each)};"""
    return browser.execute_script(script, measure, group)


def test_plots_hold_the_numbers_of_the_files(page, runs):
    panels = page.execute_script("return report.data.panels.filter((p) => p.kind === 'lines')")
    checked = 0
    for panel in panels:
        drawn = {t["name"]: t for t in traces(page, panel["key"]) if t["kind"] == "run"}
        for run in runs:
            rows = logged(run)
            if not any(panel["metric"] in row for row in rows):
                continue
            if panel["markers"]:
                rows = [row for row in rows if panel["metric"] in row]
            found = drawn[run.name]
            assert found["x"] == [row["step"] for row in rows], panel["key"]
            assert found["y"] == as_plotted(float(row[panel["metric"]]) for row in rows), panel["key"]
            checked += 1
    assert checked > 50


def test_what_a_run_did_not_log_is_not_drawn(page, runs):
    names = {t["name"] for t in traces(page, "update_grad_norm")}
    assert names == {"stare-s0", "stare-s1", "stare, mean of 2"}
    assert cell(page, "grad_norm_last", 1)["text"] == "–"
    assert cell(page, "gate_duty", 1)["text"] == "–"
    assert "reflection words" in page.execute_script("return document.getElementById('absent').innerText")


def test_the_table_holds_the_numbers_of_the_files(page, runs):
    stare = {run.name: logged(run) for run in runs[:2]}
    of = {
        "entropy_first": lambda rows: rows[0]["policy/entropy"],
        "entropy_last": lambda rows: statistics.fmean(r["policy/entropy"] for r in rows[-10:]),
        "reward_last": lambda rows: statistics.fmean(r["reward/mean"] for r in rows[-10:]),
        "eval/held_out/pass@8": lambda rows: rows[-1]["eval/held_out/pass@8"],
        "trained_tokens": lambda rows: sum(r["throughput/trained_tokens"] for r in rows),
        "mismatch_max": lambda rows: max(r["mismatch/max"] for r in rows),
        "seconds_rollout": lambda rows: statistics.fmean(r["time/rollout"] for r in rows),
        "share_in_band": in_band,
    }
    for measure, value in of.items():
        found = cell(page, measure, 0)
        want = {name: value(rows) for name, rows in stare.items()}
        unit = page.execute_script(
            f"return document.querySelector('#table tr[data-measure=\"{measure}\"] th small').innerText"
        )
        assert {name: v for name, (v, _) in found["each"].items()} == pytest.approx(want, rel=1e-14), measure
        assert {name: text for name, (_, text) in found["each"].items()} == {
            n: number(v, unit) for n, v in want.items()
        }
        assert float(found["mean"]) == pytest.approx(statistics.fmean(want.values()), rel=1e-14), measure
        assert float(found["std"]) == pytest.approx(statistics.stdev(want.values()), rel=1e-12, abs=1e-300), measure
        assert found["n"] == "2"
    alone = cell(page, "reward_last", 1)
    want = statistics.fmean(r["reward/mean"] for r in logged(runs[2])[-10:])
    assert float(alone["mean"]) == pytest.approx(want, rel=1e-14)
    assert (alone["n"], alone["text"]) == ("1", number(want, "reward"))


def in_band(rows) -> float:
    inside = [abs(r["policy/entropy"] - 0.2) <= 0.3 * 0.2 for r in rows]
    after = inside[inside.index(True) + 1 :]
    return sum(after) / len(after)


@pytest.mark.parametrize("align", list(Align))
@pytest.mark.parametrize("window", [1, 10])
def test_axes_smoothing_and_means_are_those_of_the_package(page, runs, align, window):
    keys = ("policy_entropy", "eval_held_out_avg_at_8")
    choose(page, "align", align.value, *keys)
    choose(page, "window", str(window), *keys)
    try:
        loaded = [load(run, NOW) for run in runs[:2]]
        for key, metric in zip(keys, ("policy/entropy", "eval/held_out/avg@8"), strict=True):
            drawn = {t["name"]: t for t in traces(page, key)}
            curves = []
            for run in loaded:
                x, y = position(run, align), moving_average(derived.series(run, metric), window)
                curves.append((x, y))
                kept = np.isfinite(y)
                assert drawn[run.name]["x"] == pytest.approx(x[kept].tolist(), rel=1e-13)
                assert drawn[run.name]["y"] == pytest.approx(y[kept].tolist(), rel=1e-13)
            x, y = mean_curve(curves, align)
            assert drawn["stare, mean of 2"]["x"] == pytest.approx(x.tolist(), rel=1e-12)
            assert drawn["stare, mean of 2"]["y"] == pytest.approx(y.tolist(), rel=1e-12)
        title = page.execute_script("return document.getElementById('plot-policy_entropy').innerText")
        assert ("moving average of the last 10 steps" in title) == (window > 1)
        assert ("not smoothed" in title) == (window == 1)
    finally:
        choose(page, "window", "1", *keys)
        choose(page, "align", "step", *keys)


def test_the_target_band_is_drawn(page):
    shapes = page.execute_script("return document.getElementById('plot-policy_entropy').layout.shapes")
    bands = [(s["y0"], s["y1"]) for s in shapes if s["type"] == "rect"]
    assert bands == [(pytest.approx(0.14), pytest.approx(0.26))]


def test_the_legend_hides_and_shows_a_group_everywhere(page):
    chip = page.execute_script("return document.querySelector('[data-group=\"0\"]')")
    page.execute_script("arguments[0].click()", chip)
    keys = ("policy_entropy", "reward_mean", "time_in_band", "phases")
    draw(page, *keys)
    for key in keys:
        assert not any("stare" in str(t["name"]) or "stare" in str(t["y"]) for t in traces(page, key)), key
    assert chip.get_attribute("aria-pressed") == "false"
    page.execute_script("arguments[0].click()", chip)
    draw(page, *keys)
    assert {"stare-s0", "stare-s1"} <= {t["name"] for t in traces(page, "policy_entropy")}


def test_any_metric_can_be_drawn(page, runs):
    choose(page, "metric", "groups/sampled", "any")
    drawn = {t["name"]: t["y"] for t in traces(page, "any")}
    assert drawn["stare-s1"] == [row["groups/sampled"] for row in logged(runs[1])]


def test_facts_of_the_runs(page):
    row = page.execute_script("return document.querySelectorAll('#run-facts tbody tr')[2].innerText")
    assert "grpo <b>" in row
    assert f"25 of {STEPS}" in row
    assert "last line of the metrics was cut off: left out" in row
    assert "2 CPUs (x86_64)" in page.execute_script("return document.getElementById('common').innerText")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_sideways_scrolling(page, width, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    resize(page, width)
    try:
        page.refresh()  # as a phone opens it; a page that was wide keeps its wide viewport for a while
        page.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        draw(page)
        require_fits(page, width, "figure, .card, .scroll, article, h1, h2")
    finally:
        resize(page, WIDTHS[0])
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_errors_and_no_network(page):
    """Last: everything above has happened on the page."""
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked, "the page itself is a request"
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_an_empty_run_is_refused(tmp_path):
    path = write_run(tmp_path, "a", steps=1)
    (path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step was logged yet"):
        compare([path], tmp_path / "out", Options())
