"""What made a checkpoint, kept with it, and whether a run that wants to go on from there is the same run.

Keys that say where things are and how they run may differ: those of the type `Free` in the configuration. Files are
compared by content: prompts by `StreamState.fingerprint`, the model's configuration and tokenizer, the files of the
user's own objects, and the weights of a reference policy, by `Settings`; the policy's weights are the checkpoint's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stare_megatron.config import Config, SftConfig, all_keys, flatten
from stare_megatron.config.loader import walk
from stare_megatron.data.tokenizer import FILES
from stare_megatron.errors import UserError
from stare_megatron.host import manifest
from stare_megatron.host.files import write_atomic

Root = TypeVar("Root", Config, SftConfig)
FILE = "settings.json"
_MODEL = "config.json"
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """`config`: the resolved configuration, nested; `files`: checksum of each file of `model.path` that is not weights
    and decides what the model or its tokens are; `code`: of the file of each object of the user's, by its key;
    `reference`: of each file of the reference policy's weights, with `algorithm.kl`."""

    config: dict[str, Any]
    files: dict[str, str]
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    reference: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, config: Config | SftConfig) -> Settings:
        """The same files, read once, with what has been settled in the configuration since."""
        return dataclasses.replace(self, config=config.model_dump(mode="json"))


def settings_of(config: Config | SftConfig) -> Settings:
    """Those of a run about to start.

    Raises:
        UserError: a file of `model.path` or of the reference policy cannot be read.
    """
    folder = config.model.path
    try:
        files = {
            name: manifest.checksum(folder / name).checksum for name in (_MODEL, *FILES) if (folder / name).is_file()
        }
    except OSError as e:
        raise UserError(f"model.path = {str(folder)!r}: cannot be read: {e}") from e
    code = {key: manifest.checksum(file).checksum for key, file in config.own_files().items()}
    reference = _reference_of(config) if isinstance(config, Config) else {}
    return Settings(config.model_dump(mode="json"), files, code, reference)


def _reference_of(config: Config) -> dict[str, str]:
    """Checksums of the weights that the reference policy is read from, each file read once."""
    if not config.algorithm.kl.on:
        return {}
    named = config.algorithm.kl.reference or config.model.weights or str(config.model.path)
    folder = Path(named)
    try:
        # A Hugging Face folder's tensors, or all of a Megatron-Core checkpoint.
        names = [name for name in manifest.files(folder) if Path(name).suffix in (".safetensors", ".distcp", ".pt")]
        return {name: manifest.checksum(folder / name).checksum for name in names}
    except OSError as e:
        raise UserError(f"algorithm.kl: the reference policy of {named!r} cannot be read: {e}") from e


def write(folder: Path, settings: Settings) -> None:
    """Write `settings.json`."""
    write_atomic(folder / FILE, json.dumps(dataclasses.asdict(settings), indent=1))


def read(folder: Path) -> Settings:
    """Those of a checkpoint.

    Raises:
        UserError: `settings.json` is missing or damaged.
    """
    file = folder / FILE
    try:
        tree = json.loads(file.read_text())
        reference = dict(tree.get("reference", {}))  # none before there was a KL
        return Settings(dict(tree["config"]), dict(tree["files"]), dict(tree["code"]), reference)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{file}: not the settings of a checkpoint: {type(e).__name__}: {e}") from e


def with_date(config: Root, folder: Path | None) -> Root:
    """`config` with the date that the prompts of a checkpoint were written with, unless it names one itself.

    Raises:
        UserError: `settings.json` is missing or damaged.
    """
    date = flatten(read(folder).config).get("data.date", "") if folder and not config.data.date else ""
    return config.dated(str(date)) if date else config


def check_settings(folder: Path, now: Settings, allow: Sequence[str]) -> None:
    """Refuse to go on from a checkpoint that another configuration, model or tokenizer made. `allow`:
    `run.resume_allow`.

    Raises:
        UserError: names what differs; an unknown name in `allow`; a missing or damaged file.
    """
    root = _root(now.config)
    known = all_keys(root=root) | all_keys(now.config, root)
    tables = {".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 1)}
    for name in allow:
        # Free tables, such as [trainer.megatron], have keys that are not ours.
        if name not in known and name not in tables and not _covered(name, list(known)):
            raise UserError(f"run.resume_allow: {name!r} is no key and no table of the configuration")
    then = read(folder)
    if _root(then.config) is not root:
        made, wanted = ("sft", "train") if root is Config else ("train", "sft")
        raise UserError(
            f"{folder}: a checkpoint of `{made}`, which `{wanted}` cannot resume; begin with its weights instead: set "
            f"model.path to an export (hf/), or model.weights = {str(folder / 'trainer')!r}"
        )
    changed = [n for n in sorted(then.files.keys() | now.files.keys()) if then.files.get(n) != now.files.get(n)]
    path = now.config["model"]["path"]
    if changed and not _covered("model.path", allow):
        what = "model" if _MODEL in changed else "tokenizer"
        raise UserError(
            f"{folder}: made with another {what}: {', '.join(changed)} of model.path = {path!r} differ from what was "
            f'there; give the {what} that the run began with, or set run.resume_allow=["model.path"]'
        )
    found = [d for d in differences(then.config, now.config) if not _covered(d.key, allow)]
    for key in now.code.keys() & then.code.keys() - {d.key for d in found}:
        if now.code[key] != then.code[key] and not _covered(key, allow):
            named = f" = {flatten(now.config)[key]!r}" if key in flatten(now.config) else ""
            raise UserError(
                f"{folder}: the file of {key}{named} has changed since; give it as it was, "
                f'start a new run, or say that this is meant: run.resume_allow=["{key}"]'
            )
    _check_reference(folder, then, now, allow, found)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        keys = ", ".join(f'"{d.key}"' for d in found[:_SHOWN])
        raise UserError(
            f"{folder}: made with other settings: {'; '.join(map(str, found[:_SHOWN]))}{more}; set them as they were, "
            f"start a new run, or say that this is meant: run.resume_allow=[{keys}]"
        )


def _check_reference(
    folder: Path, then: Settings, now: Settings, allow: Sequence[str], found: Sequence[Difference]
) -> None:
    """Raises: UserError: the reference policy is not the one that the run was held to."""
    key = "algorithm.kl.reference"
    both = then.reference and now.reference  # else the coefficient differs, which is said of it
    if not both or then.reference == now.reference or _covered(key, allow) or found:
        return
    names = sorted(then.reference.keys() | now.reference.keys())
    changed = [name for name in names if then.reference.get(name) != now.reference.get(name)]
    raise UserError(
        f"{folder}: made with another reference policy: {', '.join(changed[:_SHOWN])} differ from what was there "
        f'({key}, or the model that the run begins with); give it as it was, or set run.resume_allow=["{key}"]'
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
    root = _root(now)
    keys = {key.name: key for key in [*walk(root=root), *walk(now, root)]}
    fixed = {key.name.partition(".")[0] for key in keys.values() if not key.free}
    free = [key.name for key in keys.values() if key.free]
    free += {name.partition(".")[0] for name in free} - fixed  # also keys of such a table that are gone
    defaults = {key.name: key.default for key in keys.values()}
    old, new = flatten(then), flatten(now)
    found: list[Difference] = []
    for key in dict.fromkeys([*new, *old]):
        a, b = (side.get(key, defaults.get(key)) for side in (old, new))
        if a != b and not _covered(key, free):
            found.append(Difference(key, a, b))
    # A schedule over the run's length is another one when the length changes.
    if old.get("run.steps") != new.get("run.steps") and new.get("trainer.optimizer.schedule") != "constant":
        found.append(Difference("run.steps", old.get("run.steps"), new.get("run.steps")))
    for chooser in ("algorithm.method", "reward.name", "env.name"):  # what it chooses has settings of its own
        if any(d.key == chooser for d in found):
            follows = (chooser.partition(".")[0] + ".", "data.extra_keys")
            found = [d for d in found if d.key == chooser or not d.key.startswith(follows)]
    return found


def _root(config: Mapping[str, Any]) -> type[Config] | type[SftConfig]:
    """What a resolved configuration is one of."""
    return SftConfig if "sft" in config else Config


def _covered(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _text(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, default=str)
