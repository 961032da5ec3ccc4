"""The page of `scale` in a real browser, from disk: it shows what the runs logged, on a desk and on a phone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.__main__ import main
from tests.contracts.source import ROOT
from tests.e2e.test_compare_browser import WIDTHS, driver, require_fits, resize

RESULTS = ROOT / "examples/scaling_cpu/results"
RUNS = sorted(f.parent for f in RESULTS.glob("*/eval.jsonl"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = driver()
    try:
        out = tmp_path_factory.mktemp("scale")
        assert main(["scale", str(RESULTS), "--out", str(out), "--json", str(out / "numbers.json")]) == 0
        (file,) = out.glob("*.html")
        resize(browser, WIDTHS[0])
        browser.get(file.as_uri())
        yield browser
    finally:
        browser.quit()


def shown(page: Any) -> list[str]:
    script = "return [...document.querySelectorAll('figure')].filter((f) => !f.hidden).map((f) => f.id)"
    return page.execute_script(script)


def along(page: Any, axis: str) -> None:
    script = """
        const picked = document.getElementById("axis");
        picked.value = arguments[0];
        picked.dispatchEvent(new Event("change"));"""
    page.execute_script(script, axis)


def evaluations(run: Path) -> dict[int, float]:
    """Step -> accuracy, by the file alone."""
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval/test/avg@8"] for row in rows}


def test_points_are_the_evaluations_of_the_files(page: Any) -> None:
    along(page, "steps")
    script = """
        return document.getElementById("plot-curves-steps").data.filter((t) => t.mode === "markers")
            .map((t) => [t.name, Array.from(t.x), Array.from(t.y)]);"""
    drawn = {name: dict(zip(x, y, strict=True)) for name, x, y in page.execute_script(script)}
    assert len(RUNS) == 16
    assert drawn.keys() == {run.name for run in RUNS}
    for run in RUNS:
        want = evaluations(run)
        want.pop(0)  # a logarithmic axis has no 0
        assert drawn[run.name] == pytest.approx(want), run.name


def test_one_axis_is_shown_at_a_time_and_each_is_drawn(page: Any) -> None:
    axes = page.execute_script("return [...document.getElementById('axis').options].map((o) => o.value)")
    assert {"flops", "tokens", "steps"} <= set(axes)
    for axis in axes:
        along(page, axis)
        curves = [figure for figure in shown(page) if figure.startswith("figure-curves-")]
        assert curves == [f"figure-curves-{axis}"]
        empty = """return [...document.querySelectorAll("figure")]
            .filter((f) => !f.hidden && !f.querySelector("svg.main-svg")).map((f) => f.id)"""
        assert page.execute_script(empty) == []


def test_tables_have_every_cell_and_every_run(page: Any) -> None:
    cells = page.execute_script("return [...document.querySelectorAll('#cells tbody tr')].map((r) => r.innerText)")
    assert len(cells) == 8
    runs = page.execute_script(
        "return [...document.querySelectorAll('#runs ~ .scroll tbody th')].map((h) => h.innerText)"
    )
    assert set(runs) >= {run.name for run in RUNS}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window(page: Any, width: int, scheme: str) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    resize(page, width)
    try:
        require_fits(page, width, "figure, .scroll, h1, h2, select")
    finally:
        resize(page, WIDTHS[0])
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_asks_for_nothing_and_complains_of_nothing(page: Any) -> None:
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked, "the page itself is a request"
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
