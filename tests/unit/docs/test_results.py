"""docs/results.md says what the records say."""

from __future__ import annotations

from pathlib import Path

from tools import make_results, result_cells

TEXT = make_results.PAGE.read_text()


def test_every_table_is_made_from_the_records() -> None:
    assert make_results.page(TEXT) == TEXT, "run: python tools/make_results.py"


def test_every_table_that_is_made_is_in_the_page() -> None:
    assert all(f"<!-- table: {name} -->\n" in TEXT for name in make_results.TABLES)


def test_a_number_that_is_changed_by_hand_is_found() -> None:
    spoilt = TEXT.replace("| GRPO-ds | 0.81 ± 0.10 |", "| GRPO-ds | 0.91 ± 0.10 |")
    assert spoilt != TEXT
    assert make_results.page(spoilt) == TEXT


def test_every_run_that_is_kept_is_in_a_table() -> None:
    """A folder of records that no table reads is a result that nobody is told of."""
    result_cells.runs.cache_clear()
    for make in make_results.TABLES.values():
        make()
    kept = {p.parent for p in Path(result_cells.ROOT / "examples").glob("*/results*/*/metrics.jsonl.gz")}
    assert kept == result_cells.READ
