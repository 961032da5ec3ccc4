"""The viewer of trajectories in a real browser: it says what the files say, and what a model wrote stays text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from stare_megatron.compare.report import REPORT, Options, compare
from tests.e2e.test_compare_browser import driver, require_fits, resize
from tests.unit.compare.run_folders import write_run, write_sample_records

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "<!--",
    "x" * 300,
    "\n",
    "",
    "é&amp;",
    "<tool_call>",
    '{"name": "python"}',
    "</tool_call>",
]
KEYS = {
    "id": "token_ids",
    "text": "pieces",
    "engine": "rollout_logprobs",
    "logprob": "logprobs",
    "raw": "raw_logprobs",
    "entropy": "entropies",
    "weight": "weights",
    "selection": "selection",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run = write_run(folder, "a <b>", steps=20)
    write_sample_records(run, 1, HOSTILE[:2])
    return run, [write_sample_records(run, step, HOSTILE) for step in (10, 20)]


@pytest.fixture(scope="module")
def page(files, tmp_path_factory):
    browser = driver()
    try:
        out = tmp_path_factory.mktemp("out")
        compare([files[0]], out, Options(png=False))
        resize(browser, 390)
        browser.get((out / REPORT).as_uri())
        browser.execute_script("trajectories.parse()")
        yield browser
    finally:
        browser.quit()


def choose(page, identity: str, index) -> None:
    script = """
        const select = document.getElementById("t-" + arguments[0]);
        select.value = arguments[1];
        select.dispatchEvent(new Event("change"));"""
    page.execute_script(script, identity, index)


def tokens(page) -> list[dict]:
    plain = """
        const said = (v) => (typeof v === "number" && !isFinite(v) ? "NaN" : v);
        return trajectories.tokens().map((t) => Object.fromEntries(Object.entries(t).map(([k, v]) => [k, said(v)])));"""
    return page.execute_script(plain)


def test_numbers_are_those_of_the_file(page, files):
    choose(page, "step", 2)
    for index, line in enumerate(files[1][1].read_text().splitlines()):
        choose(page, "item", index)
        want = []
        for span in json.loads(line)["spans"]:
            columns = {name: span[key] for name, key in KEYS.items() if key in span}
            if span["kind"] == "action" and index == 0:  # one of several versions; of the other it is said once
                columns["version"] = [v for v, count in span["policy_versions"] for _ in range(count)]
            want += [
                {"kind": span["kind"], **{name: values[i] for name, values in columns.items()}}
                for i in range(len(span["pieces"]))
            ]
        found = tokens(page)
        assert len(found) == len(want) > 3
        for got, token in zip(found, want, strict=True):
            for name, value in token.items():
                number = "NaN" if value is None else float(np.float32(value)) if isinstance(value, float) else value
                assert got[name] == number, (name, token)
            assert not [name for name in (*KEYS, "version") if got.get(name) is not None and name not in token]
    assert "not trained on" not in page.find_element("id", "t-legend").text
    choose(page, "colour", "selection")
    assert "not trained on" in page.find_element("id", "t-legend").text
    choose(page, "colour", "surprisal")


def test_the_text_is_the_text_and_what_a_model_wrote_is_inert(page, files):
    choose(page, "step", 2)
    shown = page.execute_script("return [...document.querySelectorAll('#t-body .text')].map((e) => e.textContent)")
    spans = json.loads(files[1][1].read_text().splitlines()[0])["spans"]
    assert shown[: len(spans)] == ["".join(span["pieces"]) for span in spans]
    call = page.execute_script("return [...document.querySelectorAll('#t-body .call')].map((e) => e.textContent)")
    assert call == ["".join(HOSTILE[-3:])]
    labels = page.execute_script("return [...document.querySelectorAll('#t-body .label')].map((e) => e.innerText)")
    assert labels[1] == "Turn 1: python ok in 0.004 s (10 tokens)"
    for step in (0, 1, 2):
        choose(page, "step", step)
        assert page.execute_script("return document.querySelectorAll('#t-body img, #t-body script').length") == 0
    assert page.execute_script("return window.pwned ?? null") is None


def test_colours_of_the_selection(page):
    choose(page, "step", 2)
    choose(page, "colour", "selection")
    marks = page.execute_script("""return trajectories.tokens().map((t, i) => {
        const e = document.querySelector(`#t-body .t[data-i="${i}"]`);
        return [t.selection ?? 0, e.classList.contains("pos") - e.classList.contains("neg")]; })""")
    assert all(code == mark for code, mark in marks)
    assert {code for code, _ in marks} == {-1, 0, 1}
    choose(page, "colour", "surprisal")
    strong = page.execute_script("""return trajectories.tokens().filter((t) => t.surprisal > 0.1).map((t) =>
        document.querySelector(`#t-body .t[data-i="${t.position}"]`).style.background !== "")""")
    assert strong
    assert all(strong)


def test_keys_walk_and_a_tap_chooses(page):
    choose(page, "step", 2)
    body = page.find_element("id", "t-body")
    body.send_keys(Keys.ARROW_RIGHT)
    assert page.find_element("id", "t-detail").text.startswith('"What is"\nid 1')
    body.send_keys(Keys.END)
    detail = page.find_element("id", "t-detail").text
    assert '"<|im_end|>"' in detail
    assert "advantage 0.5" in detail.replace("\n", " ")
    assert "engine log-prob not finite" in detail.replace("\n", " ")
    page.execute_script("document.querySelector('#t-body .observation .t').click()")
    assert "observation, no loss" in page.find_element("id", "t-detail").text
    page.execute_script("document.getElementById('t-next').click()")
    assert "failed" in page.find_element("id", "t-facts").text


@pytest.mark.parametrize("width", [1200, 390, 320])
def test_no_sideways_scrolling(page, width):
    resize(page, width)
    page.refresh()
    page.execute_script("trajectories.parse()")
    choose(page, "step", 2)
    require_fits(page, width, "#viewer, #viewer *")


def test_no_errors(page):
    assert [entry for entry in page.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
