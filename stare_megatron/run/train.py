"""A training run: what must hold before anything is started, then the parts put together, and the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.algo.algorithm import EntropyController
from stare_megatron.algo.registry import ALGORITHMS
from stare_megatron.cluster import runtime
from stare_megatron.config import Config, SftConfig, flatten
from stare_megatron.data.benchmarks import load_benchmarks
from stare_megatron.data.chat import writes_date
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.data.tokenizer import decoder, load_tokenizer
from stare_megatron.errors import GroupsLostError, HangError, MissingFilesError, RanksLostError, RunError
from stare_megatron.metrics import wandb_id
from stare_megatron.metrics.advice import Settings
from stare_megatron.metrics.events import Events
from stare_megatron.metrics.plot import plot
from stare_megatron.metrics.sinks import Sinks, open_sinks
from stare_megatron.metrics.summary import how_to_go_on, next_steps, opening, opening_notes, render, summarize
from stare_megatron.models.families import read_hf_config
from stare_megatron.rollout.collect import Collected, Collector
from stare_megatron.rollout.groups import check_env, check_prompts
from stare_megatron.rollout.own import check_own
from stare_megatron.rollout.window import Window
from stare_megatron.run import folder as run_folder
from stare_megatron.run import forecast, loop, preflight, resuming, sizing
from stare_megatron.run.alone import alone
from stare_megatron.run.banking import Banking
from stare_megatron.run.ending import ended, on_record
from stare_megatron.run.evaluation import Evaluations, Evaluator
from stare_megatron.run.rates import rates_of
from stare_megatron.run.recorder import Recorder
from stare_megatron.run.reference import check_reference_tokenizer
from stare_megatron.run.residency import Residency
from stare_megatron.run.resuming import Prepared
from stare_megatron.run.sampling import OneStepSampler, Sampler, Store, SynchronousSampler
from stare_megatron.run.saving import Saving, metric_by_step
from stare_megatron.run.session import Session, open_session
from stare_megatron.run.stop import StopSignal
from stare_megatron.run.stream import StreamSampler
from stare_megatron.run.weights import Weights
from stare_megatron.types.report import RunEvent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Root = TypeVar("Root", Config, SftConfig)
_PROBE_PREFIX = 512  # tokens: several blocks of every engine's prefix cache


def train(config: Config, *, quiet: bool, command: list[str]) -> int:
    """Check everything, run, sum up; returns the exit code: 0, or 130 when it was asked to stop.

    `command`: what started it, for the record.

    Raises:
        UserError: before anything is started. RunError: the run had to stop. KeyboardInterrupt: it was to end at once.
    """
    console = Console()
    with alone(config.folder, console.out):
        return _train(config, quiet, command, console)


def _train(config: Config, quiet: bool, command: list[str], console: Console) -> int:
    prepared = prepare(config, console)
    config = prepared.config
    folder = run_folder.open_run(config, command, prepared.sandbox)
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with contextlib.ExitStack() as end:
        end.push(functools.partial(ended, folder, functools.partial(how_to_go_on, config, finished=False)))
        wandb_id.keep(folder.path, prepared.wandb_run)
        held_out = {benchmark.name: len(benchmark.prompts) for benchmark in prepared.benchmarks}
        parameters = run_folder.parameter_count(config.model.path)
        say(opening(config, parameters, len(prepared.stream.prompts), held_out))
        expected = forecast.forecast(config)
        if lines := expected.lines():
            say(forecast.as_text(lines))
        for note in prepared.notes:
            say(f"note: {note}", style="yellow")
        with contextlib.closing(open_sinks(config, folder.path, prepared.restored, quiet, console)) as sinks:
            finished = _run(prepared, folder, sinks)
        if run_folder.is_used(folder):
            plot(folder.path)
            planned = expected.against(folder.path)
            summary = summarize(folder.path, Settings.of(flatten(config.model_dump(mode="json"))))
            console.print(render(summary, config.run.name, folder.outputs(), planned, finished=finished))
            say(next_steps(config, finished=finished))
    return 0 if finished else 130


def prepare(config: Config, console: Console) -> Prepared:
    """Check configuration, machine, checkpoint, tokenizer and data; starts nothing.

    Raises:
        UserError: the first thing found wrong.
    """
    notes = list(preflight.check(config))
    sandbox = preflight.check_sandbox(config)
    notes += [f"sandbox: {sandbox}"] if sandbox else []
    resume_from = resuming.find(config, console)
    config = checkpoint.with_date(config, resume_from)
    settings = checkpoint.settings_of(config)
    if resume_from is not None:
        checkpoint.check_settings(resume_from, settings, config.run.resume_allow)
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template_kwargs)
    check_reference_tokenizer(config, tokenizer)
    config = today(config, tokenizer)
    check_env(config.env, tokenizer)
    prompts = load_prompts(config.data, tokenizer)
    notes += opening_notes(config, len(prompts), prompts.dropped)
    benchmarks = load_benchmarks(config, tokenizer)
    check_prompts(config, prompts, benchmarks)
    check_own(config, tokenizer, prompts[0])
    stream = PromptStream(prompts, seed=config.run.seed, shuffle=config.data.shuffle)
    if config.sync.probe_every:
        stream.probe()  # refuses a data set without a prompt to probe with
    prepared = Prepared(
        config=config,
        settings=settings.of(config),
        tokenizer=tokenizer,
        stream=stream,
        benchmarks=benchmarks,
        resume_from=None,
        restored=0,
        ahead=None,
        wandb_run="",
        sandbox=sandbox,
        notes=tuple(notes),
    )
    if resume_from is None:
        return prepared
    state = checkpoint.read(resume_from)
    own = resume_from.resolve().is_relative_to(config.folder.resolve())
    return dataclasses.replace(resuming.at(prepared, resume_from, state), wandb_run=state.wandb_run if own else "")


def today(config: Root, tokenizer: PreTrainedTokenizerBase) -> Root:
    """`config` with today's date where the chat template writes one and none is settled."""
    if config.data.date or not writes_date(tokenizer):
        return config
    return config.dated(datetime.date.today().isoformat())


def _run(prepared: Prepared, folder: run_folder.RunFolder, sinks: Sinks) -> bool:
    """Start everything and train; returns whether all steps are done, and all that is due after the last."""
    config = prepared.config
    load = sizing.rollout_load(config)
    tell = Events(folder.path, sinks.note)
    stop = StopSignal(tell.noted("run", "STOPPING"))
    start = prepared.stream.state()
    with (
        on_record(tell),
        open_session(config, folder.logs, sinks.status, load, tell=tell) as session,
        stop.installed(),
    ):
        restarts = 0
        choice = resuming.Choice(folder.checkpoints, start, sinks.note)
        if prepared.resume_from is not None and checkpoint.is_local(prepared.resume_from):
            expected = prepared.restored
            prepared = choice.checked(prepared, session, contents=config.checkpoint.verify)
            if prepared.restored != expected:
                sinks.rewind(prepared.restored)
        while True:
            try:
                session.lookout.step = prepared.restored
                run = _assemble(prepared, folder, sinks, stop, session, tell)
                if prepared.resume_from is not None:
                    tell.happened("run", "RESUMED", f"going on from step {prepared.restored}, {prepared.resume_from}")
                with session.lookout.watching():
                    done = loop.train(run)
                tell.happened("run", "ENDED", f"{done} of {config.run.steps} steps are done")
                return done >= config.run.steps and not run.evaluations.due(done)
            except MissingFilesError as e:
                prepared = choice.without(prepared, session, str(e))
                if prepared.resume_from is None:
                    session.restart_trainers()
                sinks.rewind(prepared.restored)
                continue
            except (RanksLostError, GroupsLostError, HangError) as e:
                tell(RunEvent("trainer ranks", "", "HEALTHY", "DEAD", str(e)))
                if stop.asked or restarts == config.run.restarts or is_unexplained(e):
                    raise
            restarts += 1
            again = f"start {restarts} of {config.run.restarts} (run.restarts)"
            tell(RunEvent("trainer ranks", "", "DEAD", "RESTARTING", again))
            session.restart_trainers()
            prepared = choice.last(prepared, session)
            sinks.rewind(prepared.restored)
            tell(RunEvent("trainer ranks", "", "RESTARTING", "HEALTHY", f"going on from step {prepared.restored}"))


def is_unexplained(error: RunError) -> bool:
    """A hang for which no process was found to be at fault would come again."""
    return isinstance(error, HangError) and not error.culprits


def _assemble(
    prepared: Prepared, folder: run_folder.RunFolder, sinks: Sinks, stop: StopSignal, session: Session, tell: Events
) -> loop.Run[runtime.Ref]:
    """The parts of a run, put together."""
    config, stream = prepared.config, prepared.stream
    engines, trainers, decode = session.engines, session.trainers, decoder(prepared.tokenizer)
    evaluator = Evaluator(config, prepared.benchmarks, engines, runtime.fetch, decode)
    saver = checkpoint.Saver(
        folder.checkpoints,
        config.checkpoint,
        prepared.settings,
        trainers,
        estimate=run_folder.checkpoint_bytes(config),
        values=functools.partial(metric_by_step, folder.path, config.checkpoint.best_metric),
        warn=sinks.note,
        local=_local(config, folder, trainers),
    )
    sampler, banking = _sampler(prepared, session, sinks, stop, tell)
    if banking is not None:
        saver.durable = banking.durable
    controller = EntropyController(config.algorithm, ALGORITHMS[config.algorithm.method])
    under_way = min(config.window - 1, _PROBE_PREFIX) if config.sampling.mode == "stream" else 0
    weights = Weights(config.sync, config.model.dtype, trainers, engines, functools.cache(stream.probe), under_way)
    rates = rates_of(config, read_hf_config(config.model.path).sequence_cost, forecast.peak_flops(config))
    recorder = Recorder(config, session, sampler, sinks, runtime.fetch, decode, rates)
    return loop.Run(
        steps=config.run.steps,
        sampler=sampler,
        trainers=trainers,
        controller=controller,
        residency=Residency(
            engines,
            trainers,
            shared=config.inference.placement == "colocated",
            offload=config.trainer.offload,
            asleep=engines.asleep,
        ),
        weights=weights,
        recorder=recorder,
        evaluations=Evaluations(
            config, prepared.benchmarks, evaluator, sinks.log_evaluation, folder.path, prepared.restored
        ),
        saving=Saving(config, saver, weights, sampler, controller, recorder, prepared.resume_from),
        stop=stop,
    )


def _local(config: Config, folder: run_folder.RunFolder, trainers: checkpoint.NodeDisks) -> checkpoint.Local | None:
    """Checkpoints on the nodes' own disks, if the run makes some."""
    if not config.checkpoint.local:
        return None
    return checkpoint.Local(folder.checkpoints, checkpoint.home_of(config), config.checkpoint, trainers)


def _sampler(
    prepared: Prepared, session: Session, sinks: Sinks, stop: StopSignal, tell: Events
) -> tuple[Sampler[Collected[runtime.Ref]], Banking[runtime.Ref] | None]:
    """The sampler, and who keeps what it samples ahead in the run's bank, if anyone does."""
    config, stream, engines = prepared.config, prepared.stream, session.engines
    collector, store = Collector(config, engines, stream), Store(runtime.fetch, runtime.put)
    if config.sampling.mode == "sync":
        return SynchronousSampler(collector, stream), None
    if config.sampling.mode == "stream":
        banking = None
        if config.sampling.bank:
            bank = checkpoint.Bank(config.folder / run_folder.BANK)
            banking = Banking(bank, store, sinks.note, experts=config.inference.routing_replay)
        streaming = StreamSampler(collector, stream, _window(config), engines, banking, lambda: stop.asked)
        if isinstance(prepared.ahead, checkpoint.Outstanding):
            resumed = streaming.restore(prepared.ahead, prepared.restored)
            if prepared.ahead.requests:
                tell.noted("sampling", "RESUMED")(str(resumed))
        return streaming, banking
    again = tell.noted("sampling", "AGAIN")
    sampler = OneStepSampler(collector, stream, store, config.run.steps, engines, again)
    if isinstance(prepared.ahead, checkpoint.Ahead):
        sampler.restore(prepared.ahead)
    return sampler, None


def _window(config: Config) -> Window:
    size, s = config.rollout.prompts_per_step, config.sampling
    outstanding = s.outstanding(size)
    width = max(1, int(s.window * outstanding))
    return Window(size, s.max_staleness, outstanding, width, config.rollout.refills, config.run.steps)
