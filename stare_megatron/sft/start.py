"""A supervised run: what must hold before anything is started, then the parts put together, and the summary."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.config import Config, SftConfig
from stare_megatron.data.supervised import BatchStream, SequenceSet, load_sequences
from stare_megatron.data.tokenizer import ends_a_sequence, load_tokenizer, read_files
from stare_megatron.errors import HangError, RanksLostError, UserError
from stare_megatron.metrics import wandb_id
from stare_megatron.metrics.events import Events
from stare_megatron.metrics.plot import plot
from stare_megatron.metrics.sinks import Sinks, open_sinks
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import folder as run_folder
from stare_megatron.run import forecast, resuming
from stare_megatron.run.alone import alone
from stare_megatron.run.ending import ended, on_record
from stare_megatron.run.rates import rates_of
from stare_megatron.run.stop import StopSignal
from stare_megatron.run.train import is_unexplained, today
from stare_megatron.sft import display
from stare_megatron.sft.batches import HeldOut
from stare_megatron.sft.check import check
from stare_megatron.sft.loop import Run, held_out_is_due, learn
from stare_megatron.sft.recorder import Recorder
from stare_megatron.sft.saving import Saving
from stare_megatron.sft.session import Ranks, open_ranks
from stare_megatron.types.report import RunEvent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """What a run needs and has been found right. `config`: `run.steps` is settled; `written`: as it was given.
    `resume_from`: the checkpoint to go on from, of step `restored`, and the wandb run to go on with."""

    config: SftConfig
    written: SftConfig
    ranks: Config
    settings: checkpoint.Settings
    train: SequenceSet
    held_out: SequenceSet | None
    stream: BatchStream
    resume_from: Path | None
    restored: int
    wandb_run: str
    notes: tuple[str, ...]


def sft(config: SftConfig, *, quiet: bool, command: list[str]) -> int:
    """Check everything, run, sum up; returns the exit code: 0, or 130 when it was asked to stop.

    `command`: what started it, for the record.

    Raises:
        UserError: before anything is started. RunError: the run had to stop. KeyboardInterrupt: it was to end at once.
    """
    console = Console()
    with alone(config.folder, console.out):
        return _sft(config, quiet, command, console)


def _sft(config: SftConfig, quiet: bool, command: list[str], console: Console) -> int:
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    prepared = prepare(config, console)
    config, ranks = prepared.config, prepared.ranks
    folder = run_folder.open_run(ranks, command, written=prepared.written)
    with contextlib.ExitStack() as end:
        end.push(functools.partial(ended, folder, functools.partial(display.how_to_go_on, config, finished=False)))
        wandb_id.keep(folder.path, prepared.wandb_run)
        say(display.opening(config, run_folder.parameter_count(config.model.path), prepared.train, prepared.held_out))
        for note in prepared.notes:
            say(f"note: {note}", style="yellow")
        sinks = open_sinks(ranks, folder.path, prepared.restored, quiet, console, written=prepared.written)
        with contextlib.closing(sinks):
            finished = _run(prepared, folder, sinks)
        if run_folder.is_used(folder):
            plot(folder.path)
            console.print(display.summary(config, folder.outputs(), finished=finished))
            say(display.how_to_go_on(config, finished=finished))
    return 0 if finished else 130


def prepare(config: SftConfig, console: Console) -> Prepared:
    """Check configuration, machine, checkpoint, tokenizer and data; starts nothing.

    Raises:
        UserError: the first thing found wrong.
    """
    notes = list(check(config))
    resume_from = resuming.find(config, console)
    config = checkpoint.with_date(config, resume_from)
    settings = checkpoint.settings_of(config)
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template_kwargs)
    config = today(config, tokenizer)
    train = load_sequences("data.train", config.data.train, config, tokenizer)
    held_out = load_sequences("data.eval", config.data.eval, config, tokenizer) if config.data.eval else None
    for key, sequences in (("data.train", train), ("data.eval", held_out)):
        notes += display.notes(config, key, sequences) if sequences is not None else []
    notes += _unheard_end(config.model.path, tokenizer, train.ends_with())
    stream = BatchStream(train, config)
    state = checkpoint.read(resume_from) if resume_from is not None else None
    whole = stream.remaining()
    settled = config.lasting(min(config.run.steps or whole, whole))
    settings = settings.of(settled)
    restored, wandb_run = 0, ""
    if resume_from is not None and state is not None:
        checkpoint.check_settings(resume_from, settings, config.run.resume_allow)
        stream.restore(state.stream)
        own = resume_from.resolve().is_relative_to(config.folder.resolve())
        restored, wandb_run = state.step, state.wandb_run if own else ""
        left = restored + stream.remaining()  # with batches of another size, if that was allowed
        settled = settled.lasting(min(config.run.steps or left, left))
    fault = settled.trainer.optimizer.fault(settled.run.steps)
    if fault and not settled.trainer.optimizer.short_warmup:
        raise UserError(fault.replace("run.steps x trainer.updates_per_batch", "the epochs"))
    return Prepared(
        config=settled,
        written=config,
        ranks=settled.for_ranks(),
        settings=settings.of(settled),
        train=train,
        held_out=held_out,
        stream=stream,
        resume_from=resume_from,
        restored=restored,
        wandb_run=wandb_run,
        notes=tuple([*notes, fault] if fault else notes),
    )


def _unheard_end(model: Path, tokenizer: PreTrainedTokenizerBase, end: int) -> list[str]:
    """A note where engines would not stop at the token that answers are learned to end with."""
    ids = read_files(model).get("generation_config.json", {}).get("eos_token_id")
    own: Any = tokenizer.eos_token_id
    stops = {own, *(ids if isinstance(ids, list) else [ids])}
    if end in stops or not ends_a_sequence([end], tokenizer):
        return []
    return [
        f"answers end with {tokenizer.decode([end])!r}, at which an engine will not stop: add its id, {end}, to "
        f"eos_token_id in {model / 'generation_config.json'}, or in that of the export"
    ]


def _run(prepared: Prepared, folder: run_folder.RunFolder, sinks: Sinks) -> bool:
    """Start everything and learn; returns whether all steps are done, and the held-out loss after the last measured."""
    config = prepared.config
    tell = Events(folder.path, sinks.note)
    stop = StopSignal(tell.noted("run", "STOPPING"))
    start = prepared.stream.state()
    with on_record(tell), open_ranks(prepared.ranks, folder.logs, sinks.status) as session, stop.installed():
        restarts = 0
        while True:
            try:
                session.lookout.step = prepared.restored
                run = _assemble(prepared, folder, sinks, stop, session)
                if prepared.resume_from is not None:
                    tell.happened("run", "RESUMED", f"going on from step {prepared.restored}, {prepared.resume_from}")
                with session.lookout.watching():
                    done = learn(run)
                tell.happened("run", "ENDED", f"{done} of {config.run.steps} steps are done")
                return done >= config.run.steps and not held_out_is_due(run, done)
            except (RanksLostError, HangError) as e:
                tell(RunEvent("trainer ranks", "", "HEALTHY", "DEAD", str(e)))
                if stop.asked or restarts == config.run.restarts or is_unexplained(e):
                    raise
            restarts += 1
            again = f"start {restarts} of {config.run.restarts} (run.restarts)"
            tell(RunEvent("trainer ranks", "", "DEAD", "RESTARTING", again))
            session.restart()
            newest = checkpoint.find(folder.checkpoints, "auto")
            prepared.stream.restore(start if newest is None else checkpoint.read(newest).stream)
            if newest is not None:
                checkpoint.verify(newest, contents=False)
                prepared = dataclasses.replace(prepared, resume_from=newest, restored=checkpoint.read(newest).step)
            sinks.rewind(prepared.restored)
            tell(RunEvent("trainer ranks", "", "RESTARTING", "HEALTHY", f"going on from step {prepared.restored}"))


def _assemble(prepared: Prepared, folder: run_folder.RunFolder, sinks: Sinks, stop: StopSignal, session: Ranks) -> Run:
    """The parts of a run, put together."""
    config, ranks = prepared.config, prepared.ranks
    cost = read_hf_config(config.model.path).sequence_cost
    recorder = Recorder(config, session, sinks, rates_of(ranks, cost, forecast.peak_flops(ranks)))
    return Run(
        steps=config.run.steps,
        sequences=prepared.train,
        stream=prepared.stream,
        trainers=session.trainers,
        held_out=HeldOut(
            config, config.run.steps, prepared.held_out, sinks.log_evaluation, folder.path, prepared.restored
        ),
        recorder=recorder,
        saving=Saving(
            config,
            prepared.settings,
            folder,
            session.trainers,
            prepared.stream,
            recorder,
            prepared.resume_from,
            run_folder.checkpoint_bytes(ranks),
        ),
        stop=stop,
    )
