"""Published files from the Hugging Face hub, by their names in the repository."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from stare_megatron.data.prepare.types import Recipe
from stare_megatron.data.tokenizer import first_line
from stare_megatron.errors import UserError


@dataclass(frozen=True)
class Source:
    """Local files of a data set, sorted by name; `origin`: repository and commit, or empty for files given by path."""

    origin: str
    files: tuple[Path, ...]


def download(recipe: Recipe, repository: str, revision: str, split: str) -> Source:
    """The recipe's files of a repository; those already in the hub's local cache are not fetched again.

    Raises:
        UserError: the hub or the repository cannot be reached, or it has none of the files.
    """
    where = f"{repository}@{revision}"
    wanted = [pattern.replace("{split}", split) for pattern in recipe.patterns]
    try:
        folder = Path(
            huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=wanted)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as e:  # no network is an OSError of the hub's client
        raise UserError(
            f"{where}: cannot be fetched from the hub: {first_line(e):.200}; check the name and the network, or fetch "
            "its files yourself and give them with --file"
        ) from e
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    chosen = choose(recipe, names, split)
    if not chosen:
        raise UserError(
            f"{where}: no file like {' or '.join(wanted)}; see its page on the hub, and give its files with --file"
        )
    return Source(f"{repository}@{folder.name}", tuple(folder / name for name in chosen))


def choose(recipe: Recipe, names: list[str], split: str) -> list[str]:
    """The files of the recipe's first pattern that matches any, in order."""
    for pattern in recipe.patterns:
        matching = [name for name in sorted(names) if fnmatch.fnmatch(name, pattern.replace("{split}", split))]
        if matching:
            return matching
    return []
