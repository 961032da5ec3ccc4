"""Episodes with a tool in runs that sample ahead: a push may come between two turns, or into one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stare_megatron.metrics import jsonl
from tests import programs
from tests.contracts.source import ROOT
from tests.e2e.rescoring import EVERY_VERSION, Stretch, rescored
from tests.e2e.test_train import prompts_of
from tests.e2e.tool_run import command, make_material

STEPS, PROMPTS, SAMPLES, STALENESS = 4, 16, 8, 2
CLOSE = 3e-4  # nats, two float32 implementations; measured: 5e-5, with another version's weights 0.1 and more
AHEAD: dict[str, object] = EVERY_VERSION | {
    "inference.placement": "separate",
    "algorithm.correction.mode": "truncate",
    "rollout.prompts_per_step": PROMPTS,
    "inference.vllm.max_num_seqs": 6,  # so that episodes are under way at any time
}
STREAM = AHEAD | {"sampling.mode": "stream", "sampling.max_staleness": STALENESS}
# What the interpreter is asked for, as the worked answers ask it.
PRODUCT = re.compile(r"(?:print\(|([a-h])=)(\d+)\*(\d+)(?:\nprint\(\1)?\)")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("tool") / "material")


def text(span: dict[str, Any]) -> str:
    return "".join(span["pieces"])


def require_right(sample: dict[str, Any]) -> None:
    """Turns are those of the token stream, each is answered with what Python makes of it, and the reward is for what
    comes last."""
    prompt, *spans = sample["spans"]
    written = spans[::2]
    assert [span["kind"] for span in written] == ["action"] * len(written)
    assert [span["kind"] for span in spans[1::2]] == ["observation"] * len(spans[1::2])
    assert len(sample["turns"]) == len(written)
    for turn, span, answer in zip(sample["turns"], written, [*spans[1::2], None], strict=False):
        assert bool(turn["calls"]) == text(span).endswith("</code>")
        for call in turn["calls"]:
            if call["outcome"] == "malformed":  # half a call, or an empty one: answered with the error
                assert not call["code"]
                continue
            assert f"<code>{call['code']}</code>" in text(span)
            if answer and (asked := PRODUCT.fullmatch(call["code"])):
                product = int(asked[2]) * int(asked[3])
                assert call["outcome"] == "ok"
                assert text(answer) == f"\n<interpreter>\n{product}\n</interpreter>\n"
    a, b = text(prompt).removeprefix("<bos>").removesuffix("=").split("*")
    said = text(written[-1]).removesuffix("<eos>").rpartition("</code>")[2]
    assert sample["answer"] == str(int(a) * int(b))
    assert sample["correct"] == (said == sample["answer"])
    assert sample["reward"] == float(sample["correct"])


def trained(material: Path, runs: Path, **settings: object) -> tuple[list[jsonl.Row], list[Stretch]]:
    """A run's metrics, and the stretches of its samples; everything is right that is right in every mode."""
    done = programs.run(command(material, runs, steps=STEPS, **settings), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = jsonl.read(runs / "tool/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sync/probe"] < 1e-3 and row["response/failed"] == 0 for row in rows)
    # Engine and trainer agree where they have the same weights, and differ by updates' worth where they do not.
    assert all(row["age/0/mismatch"] < 1e-3 for row in rows if "age/0/mismatch" in row)
    assert all(row["mismatch/mean"] < 0.3 for row in rows)
    assert any(row["mismatch/mean"] > 1e-3 for row in rows)

    by_step = [prompts_of(runs / f"tool/samples/step_{step:06d}.jsonl") for step in range(1, STEPS + 1)]
    groups = [{sample["prompt_id"] for sample in samples} for samples in by_step]
    assert [len(found) for found in groups] == [PROMPTS] * STEPS
    assert len(set().union(*groups)) == PROMPTS * STEPS
    samples = [sample for samples in by_step for sample in samples]
    assert len(samples) == SAMPLES * PROMPTS * STEPS
    for sample in samples:
        require_right(sample)
    calls = sum(len(turn["calls"]) for sample in samples for turn in sample["turns"])
    assert 0.4 < calls / len(samples) < 2
    assert 0.1 < sum(sample["reward"] for sample in samples) / len(samples) < 1

    stretches = rescored(runs / "tool", material / "model")
    assert max(s.gap for s in stretches) < CLOSE
    for row, of_step in zip(rows, by_step, strict=True):
        versions = [
            {version for span in sample["spans"] for version, _ in span.get("policy_versions", ())}
            for sample in of_step
        ]
        assert row["sync/staleness"] == row["step"] - 1 - min(min(found) for found in versions)
        assert row["sync/version_spans_max"] == max(map(len, versions))  # versions only grow
    return rows, stretches


def several_of_both(sample: dict[str, Any]) -> bool:
    """Turns and versions."""
    versions = {version for span in sample["spans"] for version, _ in span.get("policy_versions", ())}
    return min(len(sample["turns"]), len(versions)) > 1


@pytest.mark.runs
def test_one_step(material: Path, tmp_path: Path) -> None:
    rows, stretches = trained(material, tmp_path, **AHEAD | {"sampling.mode": "one_step"})
    assert [row["sync/staleness"] for row in rows] == [0, *[1] * (STEPS - 1)]
    assert {(s.step, s.version) for s in stretches} == {(1, 0), *((step, step - 2) for step in range(2, STEPS + 1))}
    assert all(row["sync/version_spans"] == 1 for row in rows)


@pytest.mark.runs
def test_stream(material: Path, tmp_path: Path) -> None:
    rows, _ = trained(material, tmp_path, **STREAM)
    assert all(row["sync/staleness"] <= STALENESS for row in rows)
    assert any(row["sync/version_spans_max"] > 1 for row in rows)
    # Some episode of several turns went on under other weights.
    assert any(several_of_both(sample) for file in tmp_path.glob("tool/samples/*.jsonl") for sample in prompts_of(file))


@pytest.mark.slow
def test_stream_on_shared_devices(material: Path, tmp_path: Path) -> None:
    """The tools of episodes that wait while the ranks learn may answer meanwhile."""
    shared = {"inference.placement": "colocated", "sampling.max_staleness": 1, "sampling.over_sampling": 0.5}
    rows, _ = trained(material, tmp_path, **STREAM | shared)
    assert {row["sync/staleness"] for row in rows} == {0, 1}
    assert any(row["sync/version_spans_max"] > 1 for row in rows)
