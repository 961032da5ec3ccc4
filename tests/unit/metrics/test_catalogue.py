from pathlib import Path

import pytest

from stare_megatron.metrics import catalogue
from stare_megatron.metrics.catalogue import Metric, metrics


def test_metrics_take_their_unit_from_the_catalogue():
    assert metrics({"policy/entropy": 0.2}) == (Metric("policy/entropy", 0.2, "nats/token"),)


def test_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"no metric 'policy/entrpy'.*'policy/entropy'"):
        metrics({"policy/entrpy": 0.2})


def test_wrong_unit_is_an_error():
    with pytest.raises(ValueError, match=r"policy/entropy: unit 'bits', the catalogue says 'nats/token'"):
        Metric("policy/entropy", 0.2, "bits")


@pytest.mark.parametrize("value", [True, "0.2", None])
def test_value_must_be_a_number(value):
    with pytest.raises(ValueError, match="must be a Python number"):
        Metric("policy/entropy", value, "nats/token")


def test_a_name_twice_in_a_step_is_an_error():
    with pytest.raises(ValueError, match="reward/mean given twice"):
        catalogue.by_name([*metrics({"reward/mean": 1.0}), *metrics({"reward/mean": 0.0})])


def test_entries_are_distinct_and_whole():
    assert len(catalogue.CATALOGUE) == len(catalogue._ENTRIES)
    for entry in catalogue.CATALOGUE.values():
        assert entry.unit
        assert entry.meaning.endswith(".")
        assert entry.name.count("/") == 1


def test_page_is_the_catalogue():
    page = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
    assert page.read_text() == catalogue.markdown(), "run: python tools/make_metric_docs.py"
