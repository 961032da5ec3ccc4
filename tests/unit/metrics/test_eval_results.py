"""An evaluation's metrics are reduced as the catalogue says, from what they are made of."""

import random

import pytest

from stare_megatron.metrics import catalogue
from stare_megatron.metrics.catalogue import Reduction, by_name, entry
from stare_megatron.metrics.estimators import pass_at_k
from stare_megatron.metrics.eval_results import result, result_metrics
from stare_megatron.metrics.reduce import reduce
from stare_megatron.types import GroupSummary, Measured, Status

K = 4


def group(rng: random.Random, i: int, n: int) -> GroupSummary:
    graded = tuple(i < 4 or sample == 0 or rng.random() < 0.8 for sample in range(n))
    statuses = (Status.TRUNCATED, Status.COMPLETED, Status.FAILED)
    return GroupSummary(
        prompt_id="p",
        source="ab"[i % 2],
        rewards=(0.0,) * n,
        correct=tuple(g and rng.random() < 0.6 for g in graded),
        num_tokens=(9,) * n,
        num_action_tokens=tuple(rng.randrange(1, 99) for _ in range(n)),
        statuses=tuple(rng.choice(statuses) for _ in range(n)),
        weight_versions=(0,) * n,
        graded=graded,
        reflections=tuple(rng.randrange(5) for _ in range(n)),
        distinct_correct=rng.randrange(4),
    )


def each(groups, field):
    return [x for group in groups for x in getattr(group, field)]


def accuracies(sampled, greedily, prefix: str) -> dict[str, list[float]]:
    """By name one number a prompt."""
    counts = [(sum(g.graded), sum(g.correct)) for g in sampled]
    found = {f"{prefix}/avg@{K}": [c / n for n, c in counts]}
    for k in (1, 2, 4):
        found[f"{prefix}/pass@{k}"] = [pass_at_k(n, c, k) for n, c in counts if n >= k]
    return found | {f"{prefix}/greedy": [float(g.correct[0]) for g in greedily]}


def parts(name: str, sampled, greedily) -> dict[str, list[float]]:
    """What each metric of a benchmark is made of: numbers a prompt, a response."""
    prefix, both = f"eval/{name}", [*sampled, *greedily]
    found = accuracies(sampled, greedily, prefix)
    for source in ("a", "b"):
        own = [[g for g in groups if g.source == source] for groups in (sampled, greedily)]
        found |= accuracies(*own, f"{prefix}/{source}")
    return found | {
        f"{prefix}/length_mean": each(sampled, "num_action_tokens"),
        f"{prefix}/truncated": [s.is_truncated for s in each(sampled, "statuses")],
        f"{prefix}/greedy_length_mean": each(greedily, "num_action_tokens"),
        f"{prefix}/greedy_truncated": [s.is_truncated for s in each(greedily, "statuses")],
        f"{prefix}/distinct_correct": [g.distinct_correct for g in sampled],
        f"{prefix}/reflections": each(sampled, "reflections"),
        f"{prefix}/ungraded": [not g for g in each(both, "graded")],
        f"{prefix}/failed": [s is Status.FAILED for s in each(both, "statuses")],
    }


@pytest.mark.parametrize("seed", range(5))
def test_reductions(seed):
    rng = random.Random(seed)
    results, wanted, tokens, whole = [], {}, [], {"avg": [], "greedy": []}
    for name in ("x", "y", "z"):
        sampled = [group(rng, i, K) for i in range(9)]
        greedily = [group(rng, i, 1) for i in range(9)]
        for source in ("", "a", "b"):
            own = [[g for g in groups if source in ("", g.source)] for groups in (sampled, greedily)]
            results.append(result(name, source, K, *own, confidence=0.95))
        wanted |= parts(name, sampled, greedily)
        tokens += each([*sampled, *greedily], "num_action_tokens")
        whole["avg"].append(results[-3].avg.value)
        whole["greedy"].append(results[-3].greedy.value)
    wanted |= {"eval/avg": whole["avg"], "eval/greedy": whole["greedy"], "eval/tokens": tokens}
    got = by_name(result_metrics(results, seconds=1.5))
    want = by_name(reduce(Measured(name, value) for name, values in wanted.items() for value in values))
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-12)
    single = {name for name in got.keys() - want.keys() if entry(name).reduction is Reduction.ONE}
    assert single | want.keys() == got.keys()
    declared = {name for name in [*catalogue.CATALOGUE, *catalogue.FAMILIES] if name.startswith("eval/")}
    assert {entry(name).name for name in got} == declared
