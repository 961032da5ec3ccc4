"""Evaluation on held-out prompts, through the engines and the rollout path that training samples with.

The seeds are functions of `eval.seed`, the benchmark's name, the prompt's id and the sample's number: the same at
every step and in every run, so that two evaluations differ by their policies and not by their luck, and the samples of
avg@8 are the first eight of avg@32. Training's own seeds, its prompts and its data cursor take no part.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from stare_megatron.config import Config, Section
from stare_megatron.config.registry import is_address
from stare_megatron.config.reward import WorkerConfig
from stare_megatron.data.benchmarks import Benchmark
from stare_megatron.errors import GivenUpError
from stare_megatron.metrics import eval_records, eval_results
from stare_megatron.metrics.catalogue import Metric
from stare_megatron.metrics.eval_results import WHOLE, Result, result, result_metrics
from stare_megatron.rollout.collect import GroupDispatcher
from stare_megatron.rollout.seeds import derive_seed
from stare_megatron.types import Group, GroupRequest, GroupSummary, Sampling

Ref = TypeVar("Ref")
Ref_co = TypeVar("Ref_co", covariant=True)

SAMPLED, GREEDY = "sampled", "greedy"


class Dispatcher(GroupDispatcher[Ref_co], Protocol[Ref_co]):
    """Where requests are served."""

    def reset_prefix_cache(self) -> None:
        """Drop what the requests served so far left behind."""
        ...

    def give_up(self) -> None:
        """Make `results` end soon, with a GivenUpError."""
        ...

    def forget(self) -> None:
        """`results` has ended: drop what it waited for."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found, and its responses: benchmark -> a row a prompt and setting."""

    results: tuple[Result, ...]
    metrics: tuple[Metric, ...]
    rows: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class _Question:
    """One request: a prompt of a benchmark under a setting."""

    benchmark: Benchmark
    setting: str
    request: GroupRequest


class Evaluator(Generic[Ref]):
    """Evaluates the policy that the engines hold.

    Args:
        fetch: groups by the references that stand for them.
        decode: token ids -> text.
    """

    def __init__(
        self,
        config: Config,
        benchmarks: Sequence[Benchmark],
        dispatcher: Dispatcher[Ref],
        fetch: Callable[[Sequence[Ref]], Sequence[Group]],
        decode: eval_records.Decode,
    ) -> None:
        self._config = config
        self._benchmarks = benchmarks
        self._dispatcher = dispatcher
        self._fetch = fetch
        self._decode = decode

    def evaluate(self) -> Evaluation:
        """Sample and grade every benchmark. The engines must be awake and idle, and are left without a trace of it.

        Raises:
            GivenUpError: `give_up` was called.
        """
        began = time.monotonic()
        questions = list(self._questions())
        summaries: dict[int, GroupSummary] = {}
        rows: dict[int, dict[str, Any]] = {}
        # A group is let go when its row is made: no more of them are held than are in flight.
        self._dispatcher.submit(q.request for q in questions)
        for request, ref, summary in self._dispatcher.results():
            setting = questions[request.order].setting
            limit = self._config.eval.responses if setting == SAMPLED else 1
            rows[request.order] = eval_records.response_row(self._fetch([ref])[0], setting, limit, self._decode)
            summaries[request.order] = summary
            del ref
        self._dispatcher.reset_prefix_cache()
        results = tuple(r for b in self._benchmarks for r in self._results(b, questions, summaries))
        return Evaluation(
            results=results,
            metrics=result_metrics(results, time.monotonic() - began),
            rows={b.name: [rows[q.request.order] for q in questions if q.benchmark is b] for b in self._benchmarks},
        )

    def give_up(self) -> None:
        """End `evaluate` soon; from a signal's handler, or another thread."""
        self._dispatcher.give_up()

    def forget(self) -> None:
        """Drop what was asked for, once `evaluate` was given up."""
        self._dispatcher.forget()

    def _questions(self) -> Iterator[_Question]:
        e = self._config.eval
        order = 0
        # Greedy groups are small: they fill the engines up at the end.
        for setting in (SAMPLED, GREEDY) if e.greedy else (SAMPLED,):
            for benchmark in self._benchmarks:
                for index in range(len(benchmark.prompts)):
                    prompt = benchmark.prompts[index]
                    sampling = Sampling(
                        max_tokens=self._config.eval_response_tokens,
                        temperature=e.temperature if setting == SAMPLED else 0.0,
                        top_p=e.top_p if setting == SAMPLED else 1.0,
                        stop=tuple(self._config.rollout.stop),
                        seed=prompt_seed(e.seed, benchmark.name, prompt.id),
                    )
                    size = benchmark.samples if setting == SAMPLED else 1
                    yield _Question(benchmark, setting, GroupRequest(order, prompt, size, sampling))
                    order += 1

    def _results(
        self, benchmark: Benchmark, questions: Sequence[_Question], summaries: dict[int, GroupSummary]
    ) -> Iterator[Result]:
        """Of the whole benchmark, then of each of its sources."""
        mine = [(q.setting, summaries[q.request.order]) for q in questions if q.benchmark is benchmark]
        for source in (WHOLE, *sorted(set(benchmark.labels.values()))):
            chosen = [(s, g) for s, g in mine if source in (WHOLE, benchmark.labels[g.source])]
            sampled, greedily = ([g for s, g in chosen if s == setting] for setting in (SAMPLED, GREEDY))
            yield result(benchmark.name, source, benchmark.samples, sampled, greedily, self._config.eval.confidence)


def prompt_seed(seed: int, benchmark: str, prompt_id: str) -> int:
    """The seed from which those of a prompt's samples are derived."""
    digest = hashlib.blake2b(f"{benchmark}\0{prompt_id}".encode(), digest_size=8).digest()
    return derive_seed(seed, int.from_bytes(digest, "big"))


def fingerprint(config: Config, benchmarks: Sequence[Benchmark]) -> str:
    """A hash of everything but the policy that an evaluation's numbers depend on."""
    e = config.eval
    settings: dict[str, object] = {
        "sampling": [e.temperature, e.top_p, e.greedy, e.seed, config.eval_response_tokens, config.rollout.stop],
        "confidence": e.confidence,
        "reward": config.reward.name,
        "reflection_words": config.logging.reflection_words,
        "benchmarks": [[b.name, b.samples, b.prompts.fingerprint] for b in benchmarks],
    }
    if config.env.name != "single_turn":
        settings["env"] = config.env.model_dump(mode="json")
    if is_address(config.reward.name) or type(config.reward.settings) not in (Section, WorkerConfig):
        settings["reward"] = config.reward.model_dump(mode="json")
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


class Evaluations(Generic[Ref]):
    """The evaluations of a training run: when one is due, and their record in the run's folder.

    `log`: is told the step, the metrics and the lines of each.

    Raises:
        UserError: the record of an earlier start is damaged.
    """

    def __init__(
        self,
        config: Config,
        benchmarks: Sequence[Benchmark],
        evaluator: Evaluator[Ref],
        log: Callable[[int, Sequence[Metric], Sequence[str]], None],
        folder: Path,
        restored: int,
    ) -> None:
        self._config = config
        self._evaluator = evaluator
        self._log = log
        self._folder = folder
        self._any = bool(benchmarks)
        self._fingerprint = fingerprint(config, benchmarks)
        self._done = eval_records.restore(folder, restored, self._fingerprint)

    def due(self, step: int) -> bool:
        """Whether the policy of `step` is to be evaluated and was not yet, in this start or an earlier one."""
        wanted = self._config.eval.wanted(step, self._config.run.steps)
        return self._any and wanted and step not in self._done

    def evaluate(self, step: int) -> None:
        """Evaluate, record and log, unless it is given up. A record is in the table when all of it is on disk."""
        try:
            done = self._evaluator.evaluate()
        except GivenUpError:
            self._evaluator.forget()
            return
        folder = eval_records.step_folder(self._folder / eval_records.FOLDER, step)
        eval_records.write(folder, self._fingerprint, step, done.results, done.rows)
        eval_records.append(self._folder, step, done.metrics)
        self._done |= {step}
        self._log(step, done.metrics, eval_results.text(done.results))

    def give_up(self) -> None:
        """End the evaluation under way soon. It stays due."""
        self._evaluator.give_up()
