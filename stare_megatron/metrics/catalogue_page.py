"""The catalogue of metrics as a page of the documentation."""

from __future__ import annotations

from stare_megatron.metrics.catalogue import CATALOGUE, FAMILIES, Entry


def markdown() -> str:
    """The catalogue as the page `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "One line a step in `metrics.jsonl`, the same names in TensorBoard and Weights & Biases. Written by "
        "`python tools/make_metric_docs.py` from `stare_megatron/metrics/catalogue.py`.",
        "",
        "Step n is what the n-th optimizer step did: its entropy was measured by version n - 1 of the policy, which "
        "also sampled its rollout, unless batches are [sampled ahead](sampling.md): `sync/staleness` says how far. In "
        "JSON a value that is not finite is the string `NaN`, `Infinity` or `-Infinity`.",
        "",
        "| name | unit | reduction | meaning |",
        "|---|---|---|---|",
    ]
    lines += [_line(e) for e in CATALOGUE.values()]
    lines += [
        "",
        "Families: names with parts that a run fills in. `{source}`: label of a source of the prompts; `{benchmark}`: "
        "name of a benchmark; `{k}`: a number of samples; `{age}`: updates since the policy that drew a token, 0 for "
        "the one about to be updated, logged where batches are [sampled ahead](sampling.md); `{name}`: a name of your "
        "own, see [adding a metric](adding_a_metric.md). What begins with `eval/` is logged when an evaluation "
        "was due, in `eval.jsonl`: see [evaluation](evaluation.md).",
        "",
        "| name | unit | reduction | meaning |",
        "|---|---|---|---|",
    ]
    lines += [_line(e) for e in FAMILIES.values()]
    return "\n".join(lines) + "\n"


def _line(e: Entry) -> str:
    meaning = e.meaning.replace("|", "\\|")
    return f"| `{e.name}` | {e.unit} | {e.reduction.value} | {meaning} |"
