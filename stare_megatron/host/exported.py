"""The policy that a run exported at its end."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.host import manifest


def exported(run: Path) -> Path | None:
    """The Hugging Face folder `hf` of a run's folder; None where there is none, or where the run went on after it and
    has saved since: it is then an earlier policy than the newest checkpoint. A run saves before it exports."""
    folder = run / "hf"
    if not (folder / "config.json").is_file():
        return None
    made, saved = _written(folder), _written(_newest(run / "checkpoints"))
    return folder if not made or made >= saved else None


def _newest(checkpoints: Path) -> Path:
    latest = checkpoints / "latest"
    return checkpoints / (latest.read_text().strip() if latest.is_file() else "none")


def _written(folder: Path) -> int:
    """When a folder was sealed, nanoseconds; 0 where it was not."""
    seal = folder / manifest.NAME
    return seal.stat().st_mtime_ns if seal.is_file() else 0
