"""What a path names: a Hugging Face checkpoint, a Megatron-Core one, a training checkpoint or a whole run."""

from __future__ import annotations

import enum
import tomllib
from dataclasses import dataclass
from pathlib import Path

from stare_megatron.convert.torch_dist import FORMAT, is_torch_dist
from stare_megatron.errors import UserError

# Where a converted Megatron-Core checkpoint keeps configuration and tokenizer.
COMPANIONS = "hf"


class Kind(enum.Enum):
    HF = "Hugging Face"
    MCORE = "Megatron-Core (torch_dist)"


@dataclass(frozen=True)
class Source:
    """A checkpoint. `weights`: the folder with the tensors; `hf`: the one with config.json and tokenizer, None where it
    is not known; `root`: what a manifest covers; `what`: in words."""

    kind: Kind
    weights: Path
    hf: Path | None
    root: Path
    what: str


def resolve(path: Path, hf: Path | None = None) -> Source:
    """The checkpoint that `path` names: a folder of either kind, a training checkpoint (`.../checkpoints/step_N` or the
    `trainer` in it), or a run (its newest checkpoint). `hf` overrides where config.json comes from.

    Raises:
        UserError: none of these.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a checkpoint or of a run")
    if hf is not None and not (hf / "config.json").is_file():
        raise UserError(f"{hf}: no config.json; give the folder of the Hugging Face checkpoint the model began as")
    if is_torch_dist(path):
        if path.name == "trainer" and (path.parent / "loop.json").is_file():
            return _training(path.parent, hf)
        own = path / COMPANIONS
        return Source(Kind.MCORE, path, hf or (own if (own / "config.json").is_file() else None), path, "weights")
    if is_torch_dist(path / "trainer"):
        return _training(path, hf)
    if (path / "checkpoints").is_dir():
        return _training(_newest(path / "checkpoints"), hf)
    if (path / "config.json").is_file():
        return Source(Kind.HF, path, hf or path, path, "weights")
    missing = " (a Megatron-Core checkpoint without its .metadata?)" if (path / FORMAT).is_file() else ""
    raise UserError(f"{path}: not a checkpoint: neither config.json nor metadata.json and .metadata is there{missing}")


def _training(step: Path, hf: Path | None) -> Source:
    return Source(
        Kind.MCORE, step / "trainer", hf or _model_of_run(step.parent.parent), step, f"training checkpoint {step.name}"
    )


def _newest(checkpoints: Path) -> Path:
    try:
        name = (checkpoints / "latest").read_text().strip()
    except OSError as e:
        raise UserError(f"{checkpoints}: no checkpoint of the run yet (no file `latest`)") from e
    if not is_torch_dist(checkpoints / name / "trainer"):
        raise UserError(f"{checkpoints / name}: named by `latest`, but no whole training checkpoint")
    return checkpoints / name


def _model_of_run(run: Path) -> Path | None:
    """`model.path` of the run's configuration, where there is one that can still be found."""
    file = run / "config.toml"
    try:
        path = Path(tomllib.loads(file.read_text())["model"]["path"])
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{file}: not the configuration of a run ({e}); say --hf") from e
    return path if (path / "config.json").is_file() else None


def require_hf(source: Source) -> Path:
    """The folder with config.json.

    Raises:
        UserError: it is not known.
    """
    if source.hf is None:
        raise UserError(
            f"{source.weights}: holds no config.json and names no folder that does; say --hf FOLDER (the Hugging Face "
            f"checkpoint the model began as)"
        )
    return source.hf


def check_tokenizer(hf: Path) -> str:
    """What to tell of the tokenizer beside a config.json; the files that go along are read with or without one.

    Raises:
        UserError: it is damaged, or of another model.
    """
    from stare_megatron.data.tokenizer import has_tokenizer, load_tokenizer, read_files

    if has_tokenizer(hf):
        return f"{len(load_tokenizer(hf).get_vocab()):,} tokens"
    read_files(hf)
    return "none in the folder"
