import ast
from pathlib import Path

import pytest

from stare_megatron.metrics import catalogue, catalogue_page
from stare_megatron.metrics.catalogue import Metric, metrics
from tests.contracts.source import files, nodes


def test_metrics_take_their_unit_from_the_catalogue():
    assert metrics({"policy/entropy": 0.2}) == (Metric("policy/entropy", 0.2, "nats/token"),)


def test_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"no metric 'policy/entrpy'.*'policy/entropy'"):
        metrics({"policy/entrpy": 0.2})


def test_unknown_name_far_from_any_gets_no_suggestion_but_a_known_synonym_does():
    with pytest.raises(ValueError, match=r"catalogue\.py$"):
        metrics({"xyzzy": 0.2})
    with pytest.raises(ValueError, match=r"did you mean 'reward/correct' or 'eval/avg'\?"):
        metrics({"accuracy": 0.2})


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


def test_a_family_has_typed_members():
    name = catalogue.member("eval/{benchmark}/avg@{k}", benchmark="aime24", k=32)
    assert name == "eval/aime24/avg@32"
    assert catalogue.entry(name).name == "eval/{benchmark}/avg@{k}"
    assert metrics({name: 0.3, "source/gsm8k/reward": 1.0}) == (
        Metric(name, 0.3, "fraction"),
        Metric("source/gsm8k/reward", 1.0, "reward"),
    )
    with pytest.raises(ValueError, match="benchmark = 'a/b'"):
        catalogue.member("eval/{benchmark}/greedy", benchmark="a/b")
    with pytest.raises(ValueError, match="k = 0"):
        catalogue.member("eval/{benchmark}/avg@{k}", benchmark="x", k=0)
    with pytest.raises(ValueError, match="no family"):
        catalogue.member("eval/{benchmark}/mean", benchmark="x")


@pytest.mark.parametrize(
    "name", ["eval/x/avg@", "eval/x/avg@08", "eval/x/avg@8/ci", "eval//greedy", "eval/a b/greedy", "source/x/loss"]
)
def test_names_that_no_family_has(name):
    with pytest.raises(ValueError, match="no metric"):
        catalogue.entry(name)


def test_no_name_is_of_two_families():
    parts = {"benchmark": "greedy", "source": "greedy", "name": "greedy", "k": 4, "age": 0}
    names = [family.format(**parts) for family in catalogue.FAMILIES]
    assert len(set(names)) == len(names)
    assert [catalogue.entry(name).name for name in names] == list(catalogue.FAMILIES)


def test_page_is_the_catalogue():
    page = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"
    assert page.read_text() == catalogue_page.markdown(), "run: python tools/make_metric_docs.py"


def test_what_is_measured_under_a_literal_name_is_in_the_catalogue():
    """Before a run finds out at its first step."""
    names = set()
    for file in files(*(f"stare_megatron/{package}" for package in ("algo", "rollout", "run", "trainer"))):
        for node in nodes(file):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Measured", "mean"):
                names |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                names |= {
                    k.value for k, v in pairs if isinstance(k, ast.Constant) and ast.unparse(v)[:9] == "Reported("
                }
    assert {"reward/mean", "policy/entropy", "update/loss", "loss/detached", "time/step", "dynamics/overlap"} <= names
    for name in names:
        catalogue.entry(name)
