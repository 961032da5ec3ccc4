"""Write docs/metrics.md from the catalogue of metrics: `python tools/make_metric_docs.py`."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.metrics import catalogue_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"

if __name__ == "__main__":
    PAGE.write_text(catalogue_page.markdown())
