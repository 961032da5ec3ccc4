"""Evaluations on an in-memory sampler: seeds, counts, records, when one is due, and what is refused."""

import asyncio
import json
import math

import numpy as np
import pytest

from stare_megatron import tasks
from stare_megatron.config import parse
from stare_megatron.data.benchmarks import MAX_SOURCES, OTHER, load_benchmarks, source_labels
from stare_megatron.data.prompts import load_prompts
from stare_megatron.envs.single_turn import SingleTurn
from stare_megatron.errors import GivenUpError, UserError
from stare_megatron.metrics import jsonl
from stare_megatron.metrics.catalogue import by_name
from stare_megatron.rewards.base import RewardError
from stare_megatron.rollout.episode import run_group
from stare_megatron.rollout.sampler import SampleError
from stare_megatron.run import preflight
from stare_megatron.run.evaluation import Evaluations, Evaluator, prompt_seed
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.types import Completion, Score, Status

TOKENIZER = make_tokenizer(tasks.get("order_free_sum"))


class Engines:
    """Answers a request with one token that its seed decides, and grades it by a rule; keeps every request."""

    version = 3

    def __init__(self, correct=lambda token: token % 2 == 0, fail=(), ungraded=()):
        self.requests = []
        self.waiting = []
        self.forgotten = 0
        self.given_up = False
        self._correct, self._fail, self._ungraded = correct, fail, ungraded

    async def sample(self, token_ids, sampling):
        token = 12 + (sampling.seed % 50 if sampling.temperature else 0)
        if token in self._fail:
            raise SampleError("no slot")
        done = Status.TRUNCATED if token % 5 == 0 else Status.COMPLETED
        return Completion(np.array([token, 2], np.int32), np.zeros(2, np.float32), done, self.version)

    async def _reward(self, prompt, trajectory, tokenizer):
        token = int(trajectory.token_ids()[-2])
        if token in self._ungraded:
            raise RewardError("worker died")
        right = self._correct(token)
        return Score(float(right), right, "")

    def submit(self, requests):
        self.waiting += requests

    def results(self):
        while self.waiting:
            request = self.waiting.pop()  # not the order they were given in
            self.requests.append(request)
            if self.given_up:
                raise GivenUpError("given up (sample)")
            group = asyncio.run(
                run_group(request, make_env=SingleTurn, sampler=self, reward=self._reward, tokenizer=TOKENIZER)
            )
            yield request, group, group.summary()

    def reset_prefix_cache(self):
        self.forgotten += 1

    def give_up(self):
        self.given_up = True

    def forget(self):
        self.waiting, self.given_up = [], False


def write(path, count, source=lambda i: "sums"):
    rows = [{"prompt": f"{i % 50} :", "answer": "1", "id": f"q{i}", "source": source(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def bench(tmp_path):
    return write(tmp_path / "bench.jsonl", 6)


def config_of(tmp_path, files, **tables):
    evaluation = {"benchmarks": files, "samples": 4} | tables.pop("eval", {})
    tree = {
        "run": {"steps": 6, "dir": str(tmp_path)},
        "model": {"path": "m"},
        "data": {"train": ["p"], "max_prompt_tokens": 8},
        "reward": {"name": "exact"},
        "rollout": {"max_response_tokens": 8},
        "eval": evaluation,
    }
    return parse(tree | tables, "test")


def evaluate(config, engines):
    benchmarks = load_benchmarks(config, TOKENIZER)
    return Evaluator(config, benchmarks, engines, list, TOKENIZER.decode).evaluate()


def test_seeds_are_of_the_prompt_alone(tmp_path, bench):
    """The same at every evaluation, whatever other benchmarks, training seed or number of samples there are."""
    other = write(tmp_path / "other.jsonl", 3)
    seen = []
    for files, samples, seed in (([bench], 4, 0), ([other, bench], 8, 5)):
        engines = Engines()
        run = {"run": {"steps": 6, "seed": seed}}
        rows = evaluate(config_of(tmp_path, files, eval={"samples": samples}, **run), engines).rows["bench"]
        seen.append([row["correct"][:4] for row in rows if row["setting"] == "sampled"])
        assert {r.sampling.seed for r in engines.requests} >= {prompt_seed(0, "bench", f"q{i}") for i in range(6)}
        assert engines.forgotten == 1
    assert seen[0] == seen[1]
    assert len({tuple(row) for row in seen[0]}) > 1
    moved = evaluate(config_of(tmp_path, [bench], eval={"seed": 1}), Engines()).rows["bench"]
    assert [row["correct"] for row in moved if row["setting"] == "sampled"] != seen[0]


def test_both_settings_are_asked_with_what_was_set(tmp_path, bench):
    engines = Engines()
    settings = {"temperature": 0.7, "top_p": 0.9, "max_response_tokens": 5}
    evaluate(config_of(tmp_path, [{"path": bench, "samples": 3}], eval=settings, rollout={"stop": [";"]}), engines)
    asked = [
        (r.group_size, r.sampling.temperature, r.sampling.top_p, r.sampling.max_tokens, r.sampling.stop)
        for r in sorted(engines.requests, key=lambda r: r.order)
    ]
    assert asked == [(3, 0.7, 0.9, 5, (";",))] * 6 + [(1, 0.0, 1.0, 5, (";",))] * 6
    engines = Engines()
    evaluate(config_of(tmp_path, [bench], eval={"greedy": False}), engines)
    assert all(r.sampling.temperature for r in engines.requests)


def test_numbers_are_those_of_the_rows(tmp_path):
    bench = write(tmp_path / "mixed.jsonl", 12, source=lambda i: "even/x" if i % 2 == 0 else "odd")
    done = evaluate(config_of(tmp_path, [bench], eval={"samples": 6}), Engines())
    values = by_name(done.metrics)
    rows = [row for row in done.rows["mixed"] if row["setting"] == "sampled"]
    shares = [sum(row["correct"]) / 6 for row in rows]
    assert values["eval/mixed/avg@6"] == pytest.approx(sum(shares) / 12)
    assert values["eval/mixed/avg@6"] == pytest.approx(values["eval/mixed/pass@1"])
    assert [n for n in (1, 2, 4, 6, 8) if f"eval/mixed/pass@{n}" in values] == [1, 2, 4]
    passed = [1 - math.comb(6 - sum(row["correct"]), 4) / math.comb(6, 4) for row in rows]
    assert values["eval/mixed/pass@4"] == pytest.approx(sum(passed) / 12)
    assert values["eval/mixed/pass@4/ci_low"] < values["eval/mixed/pass@4"] < values["eval/mixed/pass@4/ci_high"]
    even = [share for share, row in zip(shares, rows, strict=True) if row["source"] == "even/x"]
    assert values["eval/mixed/even_x/avg@6"] == pytest.approx(sum(even) / 6)
    assert values["eval/mixed/greedy"] == 1.0  # token 12 is even
    assert values["eval/mixed/truncated"] == sum(s == "truncated" for row in rows for s in row["status"]) / 72
    assert values["eval/mixed/length_mean"] == 2
    assert values["eval/avg"] == values["eval/mixed/avg@6"]
    assert values["eval/tokens"] == 2 * (72 + 12)
    assert [len(row["responses"]) for row in rows] == [4] * 12


def test_distinct_correct_counts_token_sequences(tmp_path, bench):
    done = evaluate(config_of(tmp_path, [bench], eval={"samples": 64}), Engines(lambda token: token < 15))
    rows = [row for row in done.rows["bench"] if row["setting"] == "sampled"]
    assert by_name(done.metrics)["eval/bench/distinct_correct"] <= 3  # tokens 12, 13, 14
    assert sum(map(sum, (row["correct"] for row in rows))) > 3 * len(rows)
    assert by_name(done.metrics)["eval/bench/distinct_correct"] > 1


def test_what_is_not_graded_is_counted_and_in_no_accuracy(tmp_path, bench):
    """Every graded response is right, so that a zero for one that is not graded would show."""
    engines = Engines(lambda token: True, fail=range(20, 30), ungraded=range(30, 40))
    done = evaluate(config_of(tmp_path, [bench], eval={"samples": 16}), engines)
    values = by_name(done.metrics)
    rows = [row for row in done.rows["bench"] if row["setting"] == "sampled"]
    missing = sum(c is None for row in rows for c in row["correct"])
    assert missing > 20
    assert values["eval/bench/ungraded"] == missing
    assert 0 < values["eval/bench/failed"] < missing
    assert values["eval/bench/avg@16"] == 1.0
    # No prompt has 16 graded samples, so nothing is known of pass@16.
    assert math.isnan(values["eval/bench/pass@16"])
    assert values["eval/bench/pass@1"] == 1.0
    nothing = by_name(evaluate(config_of(tmp_path, [bench]), Engines(ungraded=range(100))).metrics)
    assert math.isnan(nothing["eval/bench/avg@4"])
    assert nothing["eval/bench/ungraded"] == 30


def test_the_dispatcher_may_answer_in_any_order(tmp_path, bench):
    class Straight(Engines):
        def submit(self, requests):
            super().submit(reversed(list(requests)))

    one, other = (evaluate(config_of(tmp_path, [bench]), kind()) for kind in (Engines, Straight))
    assert one.rows == other.rows
    assert one.results == other.results


def evaluations(config, engines, folder, restored=0, log=lambda *_: None):
    benchmarks = load_benchmarks(config, TOKENIZER)
    evaluator = Evaluator(config, benchmarks, engines, list, TOKENIZER.decode)
    return Evaluations(config, benchmarks, evaluator, log, folder, restored)


def test_due_at_the_start_by_number_and_at_the_end(tmp_path, bench):
    def due(**settings):
        made = evaluations(config_of(tmp_path, [bench], eval=settings), Engines(), tmp_path)
        return [step for step in range(7) if made.due(step)]

    assert due(every=4) == [0, 4, 6]
    assert due(every=3, at_start=False) == [3, 6]
    assert due(at_end=False) == [0]
    assert due(every=4, at_start=False, at_end=False) == [4]
    assert not [s for s in range(7) if evaluations(config_of(tmp_path, []), Engines(), tmp_path).due(s)]


def test_a_resumed_run_repeats_and_loses_no_evaluation(tmp_path, bench):
    config = config_of(tmp_path, [bench], eval={"every": 2})
    logged = []
    first = evaluations(config, Engines(), tmp_path, log=lambda step, found, lines: logged.append((step, lines)))
    for step in (0, 2, 4):
        first.evaluate(step)
    assert [step for step, _ in logged] == [0, 2, 4]
    assert all(line.startswith("bench") for _, lines in logged for line in lines)
    table = (tmp_path / "eval.jsonl").read_text().splitlines(keepends=True)
    assert [row["step"] for row in jsonl.read(tmp_path / "eval.jsonl")] == [0, 2, 4]
    assert (tmp_path / "eval/step-000004/bench.jsonl").read_text().count("\n") == 12

    # Killed after a checkpoint of step 3: step 4 is trained again, and evaluated again.
    again = evaluations(config, Engines(), tmp_path, restored=3)
    assert (tmp_path / "eval.jsonl").read_text() == "".join(table[:2])
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["step-000000", "step-000002"]
    assert [step for step in range(7) if again.due(step)] == [4, 6]

    # Killed after a checkpoint of step 2 whose evaluation is on record: not repeated.
    assert not evaluations(config, Engines(), tmp_path, restored=2).due(2)
    # Other settings: the numbers would not compare, so it is repeated, and what came before is left as it is.
    other = config_of(tmp_path, [bench], eval={"every": 2, "samples": 2})
    changed = evaluations(other, Engines(), tmp_path, restored=2)
    assert changed.due(2)
    changed.evaluate(2)
    assert [row["step"] for row in jsonl.read(tmp_path / "eval.jsonl")] == [0, 2]
    assert "eval/bench/avg@2" in jsonl.read(tmp_path / "eval.jsonl")[1]


def test_an_evaluation_that_is_given_up_is_not_on_record_and_stays_due(tmp_path, bench):
    config = config_of(tmp_path, [bench], eval={"every": 2})

    def right(token):
        if len(engines.requests) == 3:
            made.give_up()
        return True

    engines = Engines(right)
    made = evaluations(config, engines, tmp_path)
    made.evaluate(2)
    assert made.due(2)
    assert len(engines.requests) == 4
    assert not engines.waiting
    assert [path.name for path in tmp_path.iterdir()] == ["bench.jsonl"]
    made.evaluate(2)
    assert not made.due(2)
    assert [row["step"] for row in jsonl.read(tmp_path / "eval.jsonl")] == [2]


def test_a_torn_line_of_the_table_is_an_evaluation_that_was_not_made(tmp_path, bench):
    config = config_of(tmp_path, [bench], eval={"every": 2})
    first = evaluations(config, Engines(), tmp_path)
    first.evaluate(0)
    first.evaluate(2)
    table = tmp_path / "eval.jsonl"
    table.write_text(table.read_text()[:-40])
    again = evaluations(config, Engines(), tmp_path, restored=2)
    assert again.due(2)
    again.evaluate(2)
    assert [row["step"] for row in jsonl.read(table)] == [0, 2]


def test_responses_are_kept_for_reading(tmp_path, bench):
    config = config_of(tmp_path, [bench], eval={"responses": 2})
    evaluations(config, Engines(), tmp_path).evaluate(0)
    rows = [json.loads(line) for line in (tmp_path / "eval/step-000000/bench.jsonl").read_text().splitlines()]
    assert [(row["id"], row["setting"]) for row in rows[:1] + rows[-1:]] == [("q0", "sampled"), ("q5", "greedy")]
    assert [len(row["responses"]) for row in rows] == [2] * 6 + [1] * 6
    assert rows[6]["responses"] == [TOKENIZER.decode([12, 2])]
    results = json.loads((tmp_path / "eval/step-000000/results.json").read_text())
    assert [r["source"] for r in results["results"]] == ["", "sums"]
    assert not list((tmp_path / "eval").glob("*.partial"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"samples": 0}, "eval.samples = 0"),
        ({"benchmarks": [{"path": "x.jsonl", "samples": -1}]}, "eval.benchmarks.samples = -1"),
        ({"benchmarks": ["a/x.jsonl", "b/x.parquet"]}, "both called 'x'"),
        ({"benchmarks": [{"path": "x.jsonl", "smaples": 4}]}, "did you mean 'eval.benchmarks.samples'"),
        ({"benchmarks": [{"samples": 4}]}, "'eval.benchmarks.path' is missing"),
        ({"benchmarks": [{"path": "x.jsonl", "name": "a b"}]}, "eval.benchmarks.name = 'a b'"),
        ({"every": 3, "benchmarks": []}, "benchmarks is empty"),
        ({"temperature": 0.0}, "eval.temperature = 0.0"),
        ({"max_response_tokens": 4000}, "leaves no room for a prompt in the window of 16 tokens"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        config_of(tmp_path, ["x.jsonl"], eval=settings)


def test_files_that_are_refused(tmp_path, bench):
    with pytest.raises(UserError, match=r"eval\.benchmarks: .*nowhere\.jsonl: cannot read it"):
        preflight.check_benchmarks(config_of(tmp_path, [str(tmp_path / "nowhere.jsonl")]))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1 :", "answer": "1"}\n{"prompt": "1 :"\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:2: not valid JSON"):
        load_benchmarks(config_of(tmp_path, [str(broken)]), TOKENIZER)
    broken.write_text('{"question": "1 :", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:1: no key 'prompt'"):
        load_benchmarks(config_of(tmp_path, [str(broken)]), TOKENIZER)


def test_a_prompt_longer_than_the_window_is_refused_not_dropped(tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "3 " * 9 + ":", "answer": "1", "id": "far"}) + "\n")
    with pytest.raises(UserError, match=r"long\.jsonl: prompt 'far' has \d+ tokens.*window of 16"):
        load_benchmarks(config_of(tmp_path, [str(long)]), TOKENIZER)
    # data.max_prompt_tokens is training's: here only the window counts.
    wide = config_of(tmp_path, [str(long)], inference={"max_model_len": 64})
    assert len(load_benchmarks(wide, TOKENIZER)[0].prompts) == 1


def test_labels_of_sources(tmp_path):
    path = write(tmp_path / "many.jsonl", 200, source=lambda i: f"s/{min(i // 4, 40):02d}")
    config = config_of(tmp_path, []).data.model_copy(update={"train": [tmp_path / "many.jsonl"]})
    assert path.endswith("many.jsonl")
    labels = source_labels(load_prompts(config, TOKENIZER))
    assert labels["s/40"] == "s_40"  # the one with the most prompts
    assert len(labels) == 41
    assert list(labels.values()).count(OTHER) == 41 - MAX_SOURCES
