"""Pages that are written from code say what the code says."""

from __future__ import annotations

import runpy

from stare_megatron import config
from stare_megatron.metrics import catalogue, catalogue_page
from tests.contracts.source import ROOT


def test_every_key_has_a_meaning():
    assert [key for key, meaning in config.all_keys().items() if not meaning.strip()] == []


def test_configuration_page_is_current():
    tool = runpy.run_path(str(ROOT / "tools" / "make_config_docs.py"))
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == tool["page"](), "run: python tools/make_config_docs.py"
    assert [key for key in config.all_keys() if f"`{key.rpartition('.')[2]}`" not in page] == []


def test_metrics_page_is_current():
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == catalogue_page.markdown(), "run: python tools/make_metric_docs.py"
    assert [name for name in catalogue.CATALOGUE if f"`{name}`" not in page] == []
