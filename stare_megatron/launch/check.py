"""What a job would be refused for once it has its nodes, found before it waits for them."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.config import SftConfig
from stare_megatron.errors import UserError
from stare_megatron.launch.job import Job, named_paths
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import preflight
from stare_megatron.run.folder import CHECKPOINTS
from stare_megatron.sft import check as sft


def check(job: Job, *, container: bool) -> tuple[str, ...]:
    """Of a job whose nodes see this machine's files; `container`: but not its packages. Returns notes.

    Raises:
        UserError: what the run would refuse, with its cure.
    """
    goes_on, run = _goes_on(job), job.written
    if not container:
        return (*(sft.check(run) if isinstance(run, SftConfig) else preflight.check(run)), *goes_on)
    if isinstance(run, SftConfig):
        sft.check_files(run)
    else:
        preflight.check_data(run)
    shape = read_hf_config(job.config.model.path)
    preflight.check_weights(job.config.model.path, shape)
    preflight.check_initial(job.config.model.weights)
    preflight.check_layout(job.config, shape)
    if isinstance(run, SftConfig):
        sft.check_window(run, shape)
    else:
        preflight.check_window(run, shape)
    return goes_on


def _goes_on(job: Job) -> tuple[str, ...]:
    """A note where the run is not a new one."""
    latest = job.config.folder / CHECKPOINTS / "latest"
    if not latest.is_file():
        return ()
    return (f"{job.config.folder} has checkpoints: the job goes on from {latest.read_text().strip()}",)


def check_seen(job: Job, mounts: dict[str, Path]) -> None:
    """`mounts`: claims, and where pods see them.

    Raises:
        UserError: a path of the run is in none of them.
    """
    for key, path in (*named_paths(job.written), ("--folder", job.folder)):
        if not any(path.is_relative_to(mount) for mount in mounts.values()):
            seen = ", ".join(f"{name}:{mount}" for name, mount in mounts.items()) or "none is given"
            raise UserError(
                f"{key} = {str(path)!r}: pods see the folders of --claim alone ({seen}); write the path as a pod sees "
                "it, or add its claim"
            )
