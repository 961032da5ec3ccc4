"""The composition root: Config -> a run, from the first check to the last file. Knows every other module."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.algo import controller
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.cluster import placement, runtime
from stare_megatron.cluster.engines import EngineGroup
from stare_megatron.cluster.sandboxes import Sandboxes
from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.config import Config
from stare_megatron.data.benchmarks import Benchmark, load_benchmarks, source_labels
from stare_megatron.data.prompts import PromptStream, StreamState, load_prompts
from stare_megatron.data.tokenizer import decoder, load_tokenizer
from stare_megatron.errors import RunError, UserError
from stare_megatron.host import device
from stare_megatron.host.memory import host_memory
from stare_megatron.metrics import catalogue, eval_records, eval_results, jsonl, wandb_id
from stare_megatron.metrics.plot import plot
from stare_megatron.metrics.sinks import Sinks, open_sinks
from stare_megatron.metrics.summary import how_to_resume, next_steps, opening, opening_notes, render, summarize
from stare_megatron.rollout.collect import Collected, Collector
from stare_megatron.rollout.groups import check_env, make_runner
from stare_megatron.run import folder as run_folder
from stare_megatron.run import loop, preflight, samples
from stare_megatron.run import step_metrics as report
from stare_megatron.run.evaluation import Evaluations, Evaluator
from stare_megatron.sync.check import compare, first_difference, require_agreement
from stare_megatron.types import UNOBSERVED, Control, EntropyReading, GateDuty, ScoreSummary, StepStats, UpdateStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopSignal:
    """Ctrl-C or SIGTERM: the first asks for an end after the current step, the second ends at once."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.asked = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self._console.print("stopping after this step; once more to stop at once", style="yellow")


class StareRun:
    """What `loop.train` drives: the engines, the ranks, the data and the records of one run."""

    def __init__(
        self,
        config: Config,
        trainers: TrainerGroup,
        engines: EngineGroup,
        stream: PromptStream,
        tokenizer: PreTrainedTokenizerBase,
        evaluations: Evaluations[runtime.Ref],
        sinks: Sinks,
        stop: StopSignal,
        saver: checkpoint.Saver,
        resume_from: Path | None,
    ) -> None:
        self.steps = config.run.steps
        self._config = config
        self._trainers = trainers
        self._engines = engines
        self._stream = stream
        self._collector = Collector(config, engines, stream)
        self._decode = decoder(tokenizer)
        self._evaluations = evaluations
        self._sinks = sinks
        self._stop = stop
        self._saver = saver
        self._resume_from = resume_from
        self._algorithm = ALGORITHMS[config.algorithm.method]
        self._state = controller.initial(config.algorithm)
        self._colocated = config.inference.placement == "colocated"
        self._asleep = False
        self._seconds: dict[str, float] = {}
        self._trained = 0
        self._keep_tokens = False
        self._before = UNOBSERVED
        self._duty = GateDuty(0, 0)
        self._labels = source_labels(stream.prompts)
        self._began = self._step_began = time.monotonic()

    def restore(self) -> int:
        if self._resume_from is None:
            return 0
        self._sinks.status(f"restoring {self._resume_from}")
        state = checkpoint.read(self._resume_from)
        self._trainers.restore(self._resume_from / "trainer")
        self._state = state.controller
        self._trained = state.trained_tokens
        self._before = state.before
        # Checkpoints from before it was kept: from the record, which is cut to their step.
        self._duty = state.duty if state.duty.steps else report.gate_duty(self._config.folder)
        return state.step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._sinks.status(name)
        began = time.monotonic()
        yield
        if name == "rollout" and self._colocated:
            self._engines.sleep()
            self._asleep = True
        self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def collect(self, step: int) -> Collected:
        self._keep_tokens = self._samples_due(step + 1)  # as the step will be called once it is done
        with self._rescue(step):
            return self._collector.collect(step)

    def load(self, batch: Collected) -> None:
        self._trainers.load(batch.groups)

    def score(self) -> EntropyReading:
        reading = self._trainers.score()
        self._trained += reading.num_action_tokens
        return reading

    def observe(self, reading: EntropyReading) -> Control:
        self._state, control = self._algorithm.controller(self._config.algorithm, self._state, reading.entropy)
        return control

    def update(self, control: Control) -> StepStats:
        return self._trainers.update(control, keep_tokens=self._keep_tokens)

    def push(self, version: int) -> float:
        if self._asleep:
            self._engines.wake("weights")
        self._trainers.push(version)
        if self._asleep:
            self._engines.wake("kv_cache")
            self._asleep = False
        every = self._config.sync.probe_every
        return self._check_push(version) if every and version % every == 0 else math.nan

    @functools.cached_property
    def _probe(self):
        return self._stream.probe()

    def _check_push(self, version: int) -> float:
        """Engines and trainer must give a prompt of the data set the same log-probs; else name the culprit and stop."""
        ours = self._trainers.score_tokens(self._probe)
        worst = 0.0
        for i, theirs in enumerate(self._engines.logprobs(self._probe)):
            agreement = compare(theirs, ours)
            worst = max(worst, agreement.mean)
            require_agreement(
                f"engine {i}",
                version,
                agreement,
                self._config.sync.probe_threshold,
                lambda i=i: first_difference(self._trainers.checksums(), self._engines.checksums()[i]),
            )
        return worst

    def report(
        self,
        step: int,
        batch: Collected,
        scores: ScoreSummary,
        control: Control,
        updates: Sequence[UpdateStats],
        probe: float,
    ) -> None:
        if self._saver.pending:
            with self.phase("save"):
                self._saver.poll()
        now = time.monotonic()
        costs = report.StepCosts(
            seconds=self._seconds,
            step_seconds=now - self._step_began - self._seconds.get("eval", 0.0),
            elapsed=now - self._began,
            trainer_peak=self._trainers.peak_memory_bytes(),
            engine_peak=self._engines.peak_memory_bytes(),
            driver_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            host=host_memory(),
            trained_total=self._trained,
        )
        self._duty = self._duty.after(control)
        epoch = self._stream.state().epoch
        values = report.step_metrics(
            step, batch, scores, control, updates, probe, costs, epoch, self._before, self._duty, self._labels
        )
        self._sinks.log(step, values)
        self._before = report.observed(scores, updates)
        if self._samples_due(step):
            self._sinks.sample(samples.write(self._config, step, batch, self._trainers, self._decode))
        self._seconds = {}
        self._step_began = time.monotonic()

    def _samples_due(self, step: int) -> bool:
        every = self._config.logging.samples_every
        return bool(every) and (step % every == 0 or step == 1)

    def eval_due(self, step: int) -> bool:
        # What a stop leaves out is due when the run goes on.
        return self._evaluations.due(step) and not self.stopping()

    def evaluate(self, step: int) -> None:
        with self._rescue(step):
            done = self._evaluations.evaluate(step)
        self._sinks.log_evaluation(step, done.metrics, eval_results.text(done.results))

    def save_due(self, step: int) -> bool:
        every = self._config.checkpoint.every
        return step == self.steps or bool(every and step % every == 0)

    def save(self, step: int) -> None:
        self._saver.save(self._loop_state(step, self._stream.state()))

    def _loop_state(self, step: int, stream: StreamState) -> checkpoint.LoopState:
        return checkpoint.LoopState(
            step, self._trained, stream, self._state, self._before, self._duty, wandb_id.read(self._config.folder)
        )

    @contextlib.contextmanager
    def _rescue(self, step: int) -> Iterator[None]:
        """Where sampling after `step` fails, the ranks have not: save what they have learned since the last save."""
        place = self._stream.state()
        try:
            yield
        except RunError:
            self._saver.rescue(self._loop_state(step, place))
            raise

    def export_due(self, step: int) -> bool:
        every = self._config.checkpoint.export_every
        return bool(every and step % every == 0)

    def export(self, step: int) -> None:
        self._trainers.export_hf(self._config.folder / run_folder.EXPORTS / f"step_{step:06d}")

    def stopping(self) -> bool:
        return self._stop.asked


def train(config: Config, *, quiet: bool, command: list[str]) -> int:
    """Check everything, run, sum up; returns the exit code.

    Raises:
        UserError: before anything is started. RunError: the run had to stop.
    """
    console = Console()
    notes = list(preflight.check(config))
    sandbox = preflight.check_sandbox(config)
    notes += [f"sandbox: {sandbox}"] if sandbox else []
    settings = checkpoint.settings_of(config)
    resume_from = _checked_checkpoint(config, settings, console, notes)
    tokenizer = load_tokenizer(config.model.path)
    check_env(config.env, tokenizer)
    prompts = load_prompts(config.data, tokenizer)
    notes += opening_notes(config, len(prompts), prompts.dropped)
    benchmarks = load_benchmarks(config, tokenizer)
    stream = PromptStream(prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    if config.sync.probe_every:
        stream.probe()  # refuses a data set without a prompt to probe with
    restored = 0
    wandb_run = ""
    if resume_from is not None:
        state = checkpoint.read(resume_from)
        stream.restore(state.stream)
        restored = state.step
        if resume_from.resolve().is_relative_to(config.folder.resolve()):
            wandb_run = state.wandb_run
    folder = run_folder.open_run(config, command, sandbox)
    wandb_id.keep(folder.path, wandb_run)
    parameters, held_out = run_folder.parameter_count(config.model.path), {b.name: len(b.prompts) for b in benchmarks}
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    say(opening(config, parameters, len(prompts), held_out))
    for note in notes:
        say(f"note: {note}", style="yellow")
    stop = StopSignal(console)
    try:
        with contextlib.closing(open_sinks(config, folder.path, restored, quiet, console)) as sinks, stop.installed():
            code = _train(config, settings, folder, stream, benchmarks, tokenizer, sinks, stop, resume_from, restored)
    except (UserError, KeyboardInterrupt):
        run_folder.discard(folder)
        raise
    except RunError as e:
        raise RunError(f"{e}\nlogs: {folder.logs}\n{how_to_resume(folder.path)}") from e
    if run_folder.is_used(folder):
        plot(folder.path)
        console.print(render(summarize(folder.path), config.run.name, folder.outputs(), finished=code == 0))
        say(next_steps(config, finished=code == 0))
    return code


def _checked_checkpoint(
    config: Config, settings: checkpoint.Settings, console: Console, notes: list[str]
) -> Path | None:
    """The checkpoint to go on from, found undamaged and of this configuration; adds to `notes`."""
    if config.checkpoint.best_metric:
        try:
            catalogue.entry(config.checkpoint.best_metric)
        except ValueError as e:
            raise UserError(f"checkpoint.best_metric = {config.checkpoint.best_metric!r}: {e}") from e
    found = checkpoint.find(config.folder / run_folder.CHECKPOINTS, config.run.resume)
    if found is not None:
        console.print(f"checking {found}", markup=False, highlight=False, soft_wrap=True)
        note = checkpoint.verify(found, contents=config.checkpoint.verify)
        notes.extend([note] if note else [])
        checkpoint.check_settings(found, settings, config.run.resume_allow)
    return found


def _values(folder: Path, metric: str) -> dict[int, float]:
    """A metric of the run so far, by step."""
    tables = [t for t in (folder / jsonl.FILE, folder / eval_records.TABLE) if t.exists()]
    return {int(row["step"]): row[metric] for table in tables for row in jsonl.read(table) if metric in row}


def _train(
    config: Config,
    settings: checkpoint.Settings,
    folder: run_folder.RunFolder,
    stream: PromptStream,
    benchmarks: Sequence[Benchmark],
    tokenizer: PreTrainedTokenizerBase,
    sinks: Sinks,
    stop: StopSignal,
    resume_from: Path | None,
    restored: int,
) -> int:
    transport = device.weight_transport(colocated=config.inference.placement == "colocated")
    with contextlib.ExitStack() as stack:
        sinks.status("starting Ray")
        ranks = config.trainer.world_size
        stack.enter_context(runtime.cluster(config.cluster, placement.actors(config, ranks)))
        places = placement.plan(config)
        stack.callback(places.release)
        sandboxes = Sandboxes(config.sandbox, folder.logs, wanted=config.uses_sandbox)
        stack.callback(sandboxes.close)
        sinks.status("starting engines and trainer ranks")
        runner = functools.partial(make_runner, config)
        engines = EngineGroup(config, places.engines, transport, runner, sandboxes.actors, folder.logs)
        stack.callback(engines.close)
        trainers = TrainerGroup(config, places.trainers, folder.logs)
        stack.callback(trainers.close)
        sandboxes.ready(config.cluster.start_timeout)
        trainers.ready()
        engines.ready()
        trainers.connect(engines, transport)
        evaluator = Evaluator(config, benchmarks, engines, lambda ref: runtime.fetch([ref])[0], decoder(tokenizer))
        evaluations = Evaluations(config, benchmarks, evaluator, folder.path, restored)
        saver = checkpoint.Saver(
            folder.checkpoints,
            config.checkpoint,
            settings,
            trainers,
            estimate=run_folder.checkpoint_bytes(config),
            values=functools.partial(_values, folder.path, config.checkpoint.best_metric),
            warn=sinks.note,
        )
        run = StareRun(config, trainers, engines, stream, tokenizer, evaluations, sinks, stop, saver, resume_from)
        done = loop.train(run)
        saver.wait()
        finished = done >= config.run.steps
        if finished and config.checkpoint.export_final:
            sinks.status("exporting the policy")
            trainers.export_hf(folder.export)
    return 0 if finished else 130
