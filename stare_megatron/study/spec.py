"""What a study file says: one base configuration, variants of it, seeds, and forms (a quick one, a full one).

    base = "run.toml"                  # beside the study file
    dir = "runs/entropy_band"          # holds the run folders; relative to where the command runs
    prepare = ["{python} tools/make_tiny_model.py --seed {seed} --out .cache/seed-{seed}"]    # once a seed
    seeds = [1, 2, 3]
    settings = ["model.path=.cache/seed-{seed}/model"]    # of every run, as on the command line

    [variants.grpo_ds]
    title = "GRPO-ds"
    settings = ["algorithm.method=grpo"]
    prepare = []                       # commands that only this variant needs, after those above; each is run once

    [forms.quick]                      # a smaller study of the same file, in `dir`-quick
    seeds = [1]
    variants = ["grpo_ds", "stare_o1"]
    settings = ["run.steps=120"]

`{seed}` and `{python}` are replaced everywhere. Later settings win: the study's, then the variant's, then the form's.
"""

from __future__ import annotations

import fnmatch
import shlex
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from stare_megatron import config
from stare_megatron.config import Config
from stare_megatron.config.include import COMMAND_LINE
from stare_megatron.config.methods import Section
from stare_megatron.errors import UserError, suggest


class VariantSpec(Section):
    title: str = Field(min_length=1, description="How reports call it.")
    settings: list[str] = Field(default_factory=list, description="key.sub=value")
    prepare: list[str] = Field(
        default_factory=list, description="Commands before the runs of a seed, after the study's."
    )


class FormSpec(Section):
    seeds: list[int] = Field(default_factory=list, description="Instead of the study's.")
    variants: list[str] = Field(default_factory=list, description="Only these; empty: all.")
    settings: list[str] = Field(default_factory=list, description="key.sub=value, after all others.")


class StudySpec(Section):
    base: str = Field(min_length=1, description="Configuration that all runs share; relative to the study file.")
    dir: Path = Field(description="Folder of the run folders.")
    prepare: list[str] = Field(default_factory=list, description="Commands before the runs of a seed, in order.")
    seeds: list[int] = Field(min_length=1, description="Seeds of each variant.")
    settings: list[str] = Field(default_factory=list, description="key.sub=value of every run.")
    variants: dict[str, VariantSpec] = Field(min_length=1, description="What is compared.")
    forms: dict[str, FormSpec] = Field(default_factory=dict, description="Smaller studies of the same file.")

    @model_validator(mode="after")
    def _known(self) -> StudySpec:
        for name, form in self.forms.items():
            for variant in form.variants:
                if variant not in self.variants:
                    raise ValueError(f"forms.{name}.variants: no variant {variant!r}; there are {list(self.variants)}")
        return self


_UNKNOWN = "extra_forbidden"  # pydantic's type of the error
_TABLES: dict[str, type[Section]] = {"variants": VariantSpec, "forms": FormSpec}


@dataclass(frozen=True)
class Job:
    """One run of a study: its command-line settings and what they resolve to."""

    variant: str
    title: str
    seed: int
    settings: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return self.config.run.name


@dataclass(frozen=True)
class Study:
    """A study ready to run.

    `prepare`: seed -> commands, split into words; `by_seed`: keys that each seed sets to a value of its own.
    """

    base: Path
    folder: Path
    jobs: tuple[Job, ...]
    prepare: dict[int, tuple[tuple[str, ...], ...]]
    by_seed: tuple[str, ...]


def load(file: Path, form: str, only: Sequence[str] = (), folder: Path | None = None) -> Study:
    """Read a study file.

    `form`: one of its forms, or "" for the whole study; `only`: patterns of run names, none: every run; `folder`:
    instead of its `dir`.

    Every run's settings are resolved here, so that a mistake in the last of them stops before the first starts.

    Raises:
        UserError: unreadable file, unknown key, form or variant, a setting that is refused, or no run to do.
    """
    spec = _read(file)
    if form and form not in spec.forms:
        raise UserError(f"{file}: no form {form!r}; there are {', '.join(spec.forms) or 'none'}")
    chosen = spec.forms[form] if form else FormSpec()
    if folder is None:
        folder = spec.dir.with_name(f"{spec.dir.name}-{form}") if form else spec.dir
    base = file.parent / spec.base
    jobs = []
    # Seed by seed, so that a study that is cut short has compared all variants on the seeds it did.
    for seed in chosen.seeds or spec.seeds:
        for name in chosen.variants or spec.variants:
            job = _job(file, folder, spec, chosen, name, seed)
            if not only or any(fnmatch.fnmatchcase(job.name, pattern) for pattern in only):
                jobs.append(job)
    if not jobs:
        raise UserError(f"{file}: no run matches --only {' --only '.join(map(repr, only))}")
    commands = {seed: _commands(spec, [j for j in jobs if j.seed == seed], seed) for seed in {j.seed for j in jobs}}
    every = [*spec.settings, *chosen.settings, *(s for v in spec.variants.values() for s in v.settings)]
    by_seed = tuple(sorted({s.partition("=")[0] for s in every if "{seed}" in s}))
    return Study(base, folder, tuple(jobs), commands, by_seed)


def _commands(spec: StudySpec, jobs: list[Job], seed: int) -> tuple[tuple[str, ...], ...]:
    """What to run before these jobs of a seed: the study's commands, then their variants', each once."""
    lines = [*spec.prepare, *(line for job in jobs for line in spec.variants[job.variant].prepare)]
    return tuple(tuple(shlex.split(_fill(line, seed))) for line in dict.fromkeys(lines))


def _read(file: Path) -> StudySpec:
    try:
        return StudySpec.model_validate(tomllib.loads(file.read_text()))
    except OSError as e:
        raise UserError(f"{file}: cannot read the study: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{file}: not valid TOML: {e}") from e
    except ValidationError as e:
        errors = e.errors()
        raise UserError(f"{file}: {_why(next((x for x in errors if x['type'] == _UNKNOWN), errors[0]))}") from e


def _why(error: Any) -> str:
    """The fault that pydantic found, with the key and its cure."""
    parts = [str(part) for part in error["loc"]]
    key, fields = ".".join(parts), _TABLES.get(parts[0] if len(parts) > 1 else "", StudySpec).model_fields
    if error["type"] == _UNKNOWN:
        return f"unknown key {key!r}{suggest(parts[-1], fields)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing: {fields[parts[-1]].description}"
    return f"{key}: {config.wanted(error)}" if key else config.wanted(error)


def _job(file: Path, folder: Path, spec: StudySpec, form: FormSpec, name: str, seed: int) -> Job:
    variant = spec.variants[name]
    own = [f"run.dir={folder}", f"run.name={name}-seed{seed}", f"run.seed={seed}"]
    settings = tuple(_fill(s, seed) for s in (*own, *spec.settings, *variant.settings, *form.settings))
    where = f"{file}: variant {name!r}"
    try:
        resolved = config.load(file.parent / spec.base, list(settings))
    except UserError as e:
        raise UserError(f"{where}: {str(e).removeprefix(f'{COMMAND_LINE}: ')}") from e
    if resolved.run.resume != "never":
        raise UserError(f"{where}: run.resume is the study's to say; take it out")
    return Job(name, variant.title, seed, settings, resolved)


def _fill(text: str, seed: int) -> str:
    return text.replace("{seed}", str(seed)).replace("{python}", sys.executable)
