"""What becomes of a configuration: objects and numbers made from it as a run makes them, without starting one."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from stare_megatron import tasks
from stare_megatron.algo.advantages import Outcome
from stare_megatron.algo.algorithm import EntropyController
from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.correction import correct
from stare_megatron.algo.kl import with_kl
from stare_megatron.algo.losses.types import LossInputs, Sequences
from stare_megatron.algo.reduce import token_factors
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.cluster import placement, runtime
from stare_megatron.config import Config
from stare_megatron.data.packing import plan_updates
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.inference.engine import Engine
from stare_megatron.models.families import read_hf_config
from stare_megatron.rollout.collect import Collector
from stare_megatron.rollout.reflection import word_counter
from stare_megatron.run.evaluation import Evaluations, Evaluator
from stare_megatron.run.recorder import Recorder
from stare_megatron.run.saving import Saving
from stare_megatron.sandbox.pool import Sandbox
from stare_megatron.tasks.tiny_model import make_tokenizer
from stare_megatron.trainer import model, optimizer
from stare_megatron.trainer.schedule import learning_rate
from stare_megatron.types import Control, EntropyForces, ForcedReading, SequenceCost
from tests.unit.algo.test_methods import ADVANTAGE_T, ENTROPY_T, LENGTHS, NUM, OLD_T, SEQUENCE_T, candidates, column
from tests.unit.data.test_packing import summary

TOKENIZER = make_tokenizer(tasks.get("order_free_sum"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTCOMES = [Outcome(1.0, 3), Outcome(0.0, 40), Outcome(1.0, 57), Outcome(0.5, 60)]


def engine(c: Config) -> Any:
    return Engine("e", c.model.path, c.model.dtype, c.inference, c.window, c.run.seed, "gloo")._args


def megatron(c: Config) -> Any:
    """Megatron-Core's configuration of the model."""
    return vars(model.policy_config(read_hf_config(c.model.path), DTYPES[c.model.dtype], c.trainer))


def adam(c: Config) -> Any:
    """Megatron-Core's configuration of the optimizer."""
    made: list[Any] = []

    def keep(config: Any, *_: Any, **__: Any) -> Any:
        made.append(config)
        return SimpleNamespace(scale_loss=None)

    chunk = SimpleNamespace(
        config=SimpleNamespace(bf16=c.model.dtype == "bfloat16", fp16=c.model.dtype == "float16", params_dtype=None)
    )
    before = optimizer.get_megatron_optimizer, optimizer.get_model_config
    optimizer.get_megatron_optimizer, optimizer.get_model_config = keep, lambda c: c.config
    try:
        optimizer.build_optimizer([chunk], c.trainer)  # type: ignore[list-item]
    finally:
        optimizer.get_megatron_optimizer, optimizer.get_model_config = before
    return vars(made[0])


def rates(c: Config) -> Any:
    steps = c.run.steps * c.trainer.updates_per_batch
    return [learning_rate(c.trainer.optimizer, step, steps) for step in range(steps)]


def prompts(c: Config) -> Any:
    """Prompts in the order they are drawn, two epochs."""
    made = load_prompts(c.data, TOKENIZER)
    stream = PromptStream(made, seed=c.run.seed, shuffle=c.data.shuffle)
    return made.dropped, [stream.take(len(made)) for _ in range(2)]


class _Dispatcher:
    """Serves groups of which every third has unequal rewards; keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self._waiting: collections.deque[Any] = collections.deque()

    def submit(self, requests: Any) -> None:
        self._waiting.extend(requests)

    def results(self) -> Any:
        while self._waiting:
            r = self._waiting.popleft()
            self.asked.append((r.order, r.prompt.id, r.group_size, r.sampling))
            right = tuple(bool(i % 2) and not r.order % 3 for i in range(r.group_size))
            made = dataclasses.replace(summary([(6, 4)] * r.group_size), source=r.prompt.source, correct=right)
            yield r, r.order, dataclasses.replace(made, rewards=tuple(map(float, right)))


def sampled(c: Config) -> Any:
    """What is asked of the engines for one update batch, and the groups that it keeps."""
    dispatcher = _Dispatcher()
    stream = PromptStream(load_prompts(c.data, TOKENIZER), seed=c.run.seed, shuffle=c.data.shuffle)
    kept = Collector(c, dispatcher, stream).collect(1)
    return dispatcher.asked, [order for order, _ in kept.groups]


def plan(c: Config) -> Any:
    """Who trains on what, and in which micro-batches."""
    r = c.rollout
    summaries = [summary([(n + i + 5, n + 3) for i in range(r.group_size)]) for n in range(r.prompts_per_step)]
    return plan_updates(summaries, c.trainer, SequenceCost(1.0, 0.1))


def objective(c: Config) -> Any:
    """Controls over a few steps, advantages, token weights, losses, their reduction and correction."""
    a, method = c.algorithm, ALGORITHMS[c.algorithm.method]
    controller = EntropyController(a, method)
    controls = [
        controller.observe(ForcedReading(NUM, h, EntropyForces(-0.05, 1.0, -0.3)))
        for h in (0.5, 0.02, 0.19, 0.24, 0.28, 0.1, 0.05, 0.02)
    ]
    open_ = Control(True, controls[-1].weight_pos, controls[-1].weight_neg, 0.1, 0.3, controls[-1].entropy_coefficient)
    weights = method.weigh(candidates(), open_, a, OneRank())
    sequences = Sequences(SEQUENCE_T, len(LENGTHS), OneRank())
    shift_T = column(3, 1.6)
    corrected = correct(OLD_T, OLD_T + column(5, 0.8), sequences, a.correction)
    inputs = LossInputs(
        logprob_T=(OLD_T + shift_T).requires_grad_(),
        old_logprob_T=OLD_T,
        entropy_T=ENTROPY_T,
        advantage_T=ADVANTAGE_T,
        weight_T=weights.weight_T,
        selected_T=weights.selection.selected_T,
        correction_T=corrected.factor_T,
        sequences=sequences,
        control=open_,
    )
    loss = method.loss(inputs, a)
    if a.kl.on:
        loss = with_kl(loss, inputs.logprob_T, OLD_T, OLD_T - column(7, 0.9), a.kl)
    loss_T = loss.loss_T.detach()
    length_T = torch.tensor(LENGTHS, dtype=torch.float64)[SEQUENCE_T]
    factor_T = token_factors(
        a.reduction, length_T, num_action_tokens=NUM, num_sequences=len(LENGTHS), constant_length=a.response_tokens
    )
    columns = (weights.weight_T, loss_T, factor_T, corrected.factor_T)
    return controls, method.advantage(OUTCOMES, a), [x.tolist() for x in columns]


def questions(c: Config) -> Any:
    """What an evaluation asks, and the steps it is due at."""
    from stare_megatron.data.benchmarks import load_benchmarks

    benchmarks = load_benchmarks(c, TOKENIZER)
    asker: Any = Evaluator(c, benchmarks, None, None, None)  # type: ignore[arg-type]
    due = Evaluations.__new__(Evaluations)
    due._config, due._any, due._done = c, bool(benchmarks), set()  # type: ignore[attr-defined]
    steps = [step for step in range(c.run.steps + 1) if due.due(step)]
    asked = [(q.benchmark.name, q.setting, q.request.group_size, q.request.sampling) for q in asker._questions()]
    return asked, steps


def saved(c: Config) -> Any:
    """Steps whose policy is saved, exported or shown, and where to."""
    saving, recorder = Saving.__new__(Saving), Recorder.__new__(Recorder)
    saving._config = recorder._config = c
    steps = range(1, c.run.steps + 1)
    return c.folder, [(saving.due(s), saving.export_due(s), recorder.shows_tokens(s)) for s in steps]


def sandbox(c: Config) -> Any:
    made = Sandbox(c.sandbox)
    return made.cell_limits, made._limits, made._free._value, made._places._value


def places(c: Config) -> Any:
    """What a local Ray is started with, actors among it."""
    told: dict[str, Any] = {}
    before = runtime.ray.init, runtime.ray.shutdown
    runtime.ray.init, runtime.ray.shutdown = lambda **kw: told.update(kw), lambda: None
    try:
        with runtime.cluster(c.cluster, placement.actors(c, c.trainer.world_size)):
            return told
    finally:
        runtime.ray.init, runtime.ray.shutdown = before


def reflections(c: Config) -> Any:
    return word_counter(c.logging.reflection_words)("Wait, so it is 4. So?")


def rows(path: Path, first: int = 1) -> Path:
    """A prompt file with two columns for each thing that a key names."""
    lines = [
        {"prompt": f"{n} :", "q": "9 9 :", "answer": str(n), "a": "x", "id": f"r{n}", "uid": f"u{n}"}
        | {"source": "s", "group": "g"}
        for n in range(first, first + 12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
