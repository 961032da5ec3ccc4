"""What made a checkpoint, kept with it, and whether a run that wants to go on from there is the same run.

Keys that say where things are and how they run may differ. Every other key changes what is trained: so do those that
are added later, unless they are listed here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stare_megatron.config import Config, all_keys, section_of
from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import write_atomic

FILE = "settings.json"

# Keys and tables that may differ. Files are compared by content: prompts by `StreamState.fingerprint`, the model's
# configuration and tokenizer by `Settings.files`; the weights are the checkpoint's own.
FREE = (
    "run.name",
    "run.dir",
    "run.steps",
    "run.min_free_mb",
    "run.resume",
    "run.resume_allow",
    "model.path",
    "model.weights",
    "data.train",
    "data.overlong_prompts",
    "reward.processes",
    "reward.memory_mb",
    "trainer.world_size",
    "trainer.tensor_parallel",
    "trainer.pipeline_parallel",
    "trainer.virtual_pipeline",
    "trainer.context_parallel",
    "trainer.expert_parallel",
    "trainer.sequence_parallel",
    "trainer.distributed_optimizer",
    "trainer.micro_batch_tokens",
    "trainer.logits_chunk_tokens",
    "trainer.recompute",
    "inference",
    "sync",
    "checkpoint",
    "logging",
    "eval",
    "cluster",
    "sandbox",
)
# Beside config.json: what decides which ids a text becomes.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "spiece.model",
    "chat_template.jinja",
)
_MODEL = "config.json"
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config`: the resolved configuration, nested; `files`: checksum of each file of `model.path` that is not weights
    and decides what the model or its tokens are."""

    config: dict[str, Any]
    files: dict[str, str]


def settings_of(config: Config) -> Settings:
    """Those of a run about to start.

    Raises:
        UserError: a file of `model.path` cannot be read.
    """
    folder = config.model.path
    try:
        files = {
            name: manifest.checksum(folder / name).checksum
            for name in (_MODEL, *_TOKENIZER)
            if (folder / name).is_file()
        }
    except OSError as e:
        raise UserError(f"model.path = {str(folder)!r}: cannot be read: {e}") from e
    return Settings(config.model_dump(mode="json"), files)


def write(folder: Path, settings: Settings) -> None:
    """Write `settings.json`."""
    write_atomic(folder / FILE, json.dumps(dataclasses.asdict(settings), indent=1))


def check_settings(folder: Path, now: Settings, allow: Sequence[str]) -> None:
    """Refuse to go on from a checkpoint that another configuration, model or tokenizer made; one without
    `settings.json` (from before it was kept) is let through. `allow`: `run.resume_allow`.

    Raises:
        UserError: names what differs; an unknown name in `allow`; a damaged file.
    """
    known = all_keys()
    tables = {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 1)}
    for name in allow:
        # Free tables, such as [trainer.megatron], have keys that are not ours.
        if name not in known and name not in tables and not _covered(name, list(known)):
            raise UserError(f"run.resume_allow: {name!r} is no key and no table of the configuration")
    file = folder / FILE
    try:
        tree = json.loads(file.read_text())
        then = Settings(dict(tree["config"]), {str(k): str(v) for k, v in tree["files"].items()})
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: not the settings of a checkpoint: {type(e).__name__}: {e}") from e
    changed = [n for n in sorted(then.files.keys() | now.files.keys()) if then.files.get(n) != now.files.get(n)]
    path = now.config["model"]["path"]
    if changed and not _covered("model.path", allow):
        what = "model" if _MODEL in changed else "tokenizer"
        raise UserError(
            f"{folder}: made with another {what}: {', '.join(changed)} of model.path = {path!r} differ from what was "
            f'there; give the {what} that the run began with, or set run.resume_allow=["model.path"]'
        )
    found = [d for d in differences(then.config, now.config) if not _covered(d.key, allow)]
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        keys = ", ".join(f'"{d.key}"' for d in found[:_SHOWN])
        raise UserError(
            f"{folder}: made with other settings: {'; '.join(map(str, found[:_SHOWN]))}{more}; set them as they were, "
            f"start a new run, or say that this is meant: run.resume_allow=[{keys}]"
        )


@dataclasses.dataclass(frozen=True)
class Difference:
    """A key and its two values; None where it is not set."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {_text(self.then)}, is {_text(self.now)}"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What differs between two resolved configurations and changes what is trained, in the order of the keys.

    A key that only one of them has counts with its default in the other: it came with a later version, or belongs to
    another method.
    """
    old, new, defaults = _flat(then), _flat(now), _defaults()
    found: list[Difference] = []
    for key in dict.fromkeys([*new, *old]):
        a, b = (side.get(key, defaults.get(key)) for side in (old, new))
        if a != b and not _covered(key, FREE):
            found.append(Difference(key, a, b))
    # A schedule over the run's length is another one when the length changes.
    if old.get("run.steps") != new.get("run.steps") and new.get("trainer.optimizer.schedule") != "constant":
        found.append(Difference("run.steps", old.get("run.steps"), new.get("run.steps")))
    methods = [d for d in found if d.key == "algorithm.method"]
    if methods:  # its own settings follow from it
        found = [d for d in found if d.key == "algorithm.method" or not d.key.startswith("algorithm.")]
    return found


def _covered(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif value != {}:
            flat[prefix + name] = value
    return flat


def _defaults() -> dict[str, Any]:
    def walk(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in model.model_fields.items():
            kind = section_of(field.annotation)
            if kind is not None and kind is field.annotation:
                yield from walk(kind, f"{prefix}{name}.")
            elif not field.is_required():
                yield prefix + name, field.get_default(call_default_factory=True)

    return dict(walk(Config, ""))


def _text(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, default=str)
