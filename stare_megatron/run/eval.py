"""An evaluation alone: engines that hold a policy, every benchmark once, a folder of results."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from stare_megatron import checkpoint
from stare_megatron.cluster import runtime
from stare_megatron.cluster.engines import EngineGroup
from stare_megatron.config import Config
from stare_megatron.data.benchmarks import Benchmark, load_benchmarks
from stare_megatron.data.tokenizer import decoder, load_tokenizer
from stare_megatron.errors import RunError, UserError
from stare_megatron.host.exported import exported
from stare_megatron.metrics import eval_records, eval_results, events
from stare_megatron.rollout.groups import check_env, check_prompts
from stare_megatron.rollout.own import check_own
from stare_megatron.run import folder as run_folder
from stare_megatron.run import preflight, sizing
from stare_megatron.run.evaluation import Evaluation, Evaluator, fingerprint
from stare_megatron.run.residency import Residency
from stare_megatron.run.session import open_session
from stare_megatron.run.train import today
from stare_megatron.run.weights import push_to_all, renew
from stare_megatron.types.report import RunEvent


@dataclass(frozen=True)
class Policy:
    """What is evaluated: `model`, a Hugging Face folder, with the weights of `checkpoint` (of `step`) if not None.
    `run`: a checkpoint of the run that trained it, if known."""

    model: Path
    checkpoint: Path | None
    step: int
    run: Path | None = None

    @property
    def name(self) -> str:
        return str(self.checkpoint or self.model)


def find_policy(config: Config, path: Path | None) -> Policy:
    """The policy at `path`: a Hugging Face folder, a training checkpoint, or a run's folder (the policy it exported, if
    it did not go on after that, else its newest checkpoint). None: `model.path`.

    Raises:
        UserError: nothing of the kind there.
    """
    if path is None or (path / "config.json").is_file():
        return Policy(path or config.model.path, None, 0)
    if (path / "loop.json").is_file():
        return _trained(config, checkpoint.find(path.parent, str(path)) or path)
    if (path / "run.json").is_file():
        run = run_folder.RunFolder(path, fresh=False)
        newest = checkpoint.find(run.checkpoints, "auto")
        if (final := exported(path)) is not None:
            return Policy(final, None, 0, newest)
        if newest is not None:
            return _trained(config, newest)
        raise UserError(f"--model {path}: the run has neither exported a policy nor saved a checkpoint yet")
    if not path.is_dir():
        raise UserError(f"--model {path}: no such folder; give a run's, one of its checkpoints or a Hugging Face one")
    raise UserError(
        f"--model {path}: neither a Hugging Face folder (config.json), nor a training checkpoint (loop.json), nor a "
        f"run's folder (run.json){_nearby(path)}"
    )


def _nearby(path: Path) -> str:
    """What was meant, for a folder of checkpoints or one within a checkpoint."""
    if (path.parent / "loop.json").is_file():
        return f"; the checkpoint is {path.parent}"
    if (newest := checkpoint.find(path, "auto")) is not None:
        return f"; its newest checkpoint is {newest}"
    return ""


def _trained(config: Config, folder: Path) -> Policy:
    return Policy(config.model.path, folder, checkpoint.read(folder).step, folder)


def evaluate(config: Config, *, model: Path | None, out: Path | None) -> Path:
    """Check everything, evaluate, print and write what was found; returns the folder of the results.

    Raises:
        UserError: before anything is started. RunError: the evaluation had to stop; its logs stay, in OUT.partial.
        KeyboardInterrupt: it was to end at once.
    """
    console = Console()
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    policy = find_policy(config, model)
    kl = config.algorithm.kl.model_copy(update={"coefficient": 0.0})  # nothing learns: no reference
    changes: dict[str, object] = {
        "model": config.model.model_copy(update={"path": policy.model}),
        "algorithm": config.algorithm.model_copy(update={"kl": kl}),
    }
    if policy.checkpoint is None:  # nobody to share devices with
        changes["inference"] = config.inference.model_copy(update={"placement": "separate"})
    config = config.model_copy(update=changes)
    notes = preflight.check_eval(config, trainers=policy.checkpoint is not None)
    if sandbox := preflight.check_sandbox(config):
        notes = (*notes, f"sandbox: {sandbox}")
    if policy.checkpoint is not None:
        checkpoint.verify(policy.checkpoint, contents=config.checkpoint.verify)
    for note in notes:
        say(f"note: {note}", style="yellow")
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template_kwargs)
    config = today(checkpoint.with_date(config, policy.run), tokenizer)
    check_env(config.env, tokenizer)
    benchmarks = load_benchmarks(config, tokenizer)
    check_prompts(config, None, benchmarks)
    check_own(config, tokenizer, benchmarks[0].prompts[0])
    folder = out or results_folder(config, model)
    partial = _make(folder)
    try:
        with _engines(config, policy, partial / "logs", say, sizing.eval_load(benchmarks)) as engines:
            evaluator = Evaluator(config, benchmarks, engines, runtime.fetch, decoder(tokenizer))
            done = evaluator.evaluate()
        _write(config, policy, benchmarks, done, partial)
        os.rename(partial, folder)
    except (UserError, KeyboardInterrupt):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except RunError as e:
        raise type(e)(f"{e} (logs: {partial / 'logs'})") from e
    for line in (*eval_results.text(done.results), f"results: {folder}"):
        say(line)
    return folder


def results_folder(config: Config, model: Path | None) -> Path:
    """Where results go by default: `run.dir`/NAME-eval. NAME is the configuration's run, or what `model` names: a run,
    with the step of its checkpoint or export, else the folder itself."""
    if model is None:
        return config.folder.with_name(f"{config.folder.name}-eval")
    run = next((f for f in (model, *model.parents) if (f / "run.json").is_file()), model)
    step = "" if model in (run, run_folder.RunFolder(run, fresh=False).export) else f"-{model.name}"
    return config.folder.with_name(f"{run.name}{step}-eval")


def _make(folder: Path) -> Path:
    """A place to write to until all is there."""
    if folder.exists():
        raise UserError(f"{folder}: exists; name another folder with --out, or remove it")
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror}; name another folder with --out") from e
    return partial


@contextlib.contextmanager
def _engines(
    config: Config, policy: Policy, logs: Path, status: Callable[[str], None], load: sizing.Load
) -> Iterator[EngineGroup]:
    """Engines that hold the policy, for as long as they are needed."""
    tell = functools.partial(_tell, status)
    with open_session(config, logs, status, load, trainers=policy.checkpoint is not None, tell=tell) as session:
        if policy.checkpoint is not None:
            status(f"loading {policy.checkpoint}")
            engines, trainers = session.engines, session.trainers
            shared, offload = config.inference.placement == "colocated", config.trainer.offload
            residency = Residency(engines, trainers, shared=shared, offload=offload)
            residency.to_checkpoint()
            step = trainers.restore(policy.checkpoint / "trainer")
            with residency.to_engines():
                push_to_all(trainers, engines, step)
            engines.renew = functools.partial(renew, trainers, engines, step)
        status(f"evaluating {policy.name}")
        with session.lookout.watching(), session.lookout.during("eval"):
            yield session.engines


def _tell(status: Callable[[str], None], event: RunEvent) -> None:
    if event.news:
        status(events.text(event))


def _write(config: Config, policy: Policy, benchmarks: tuple[Benchmark, ...], done: Evaluation, folder: Path) -> None:
    about = {"model": policy.name, "step": policy.step, "fingerprint": fingerprint(config, benchmarks)}
    responses = folder / eval_records.RESPONSES
    responses.mkdir()
    eval_records.fill(responses, about, done.results, done.rows)
    eval_records.append(folder, policy.step, done.metrics)
    (folder / "config.toml").write_text(run_folder.to_toml(config))
