"""Which files of a Hugging Face folder are the weights, what their headers say, and whether they are the model's.

Everything that reads weights asks here, so that a start, a conversion, an inspection and an evaluation give one answer:
transformers', where vLLM gives the same. Headers only, but for a tied head. Pure Python: a driver can check with it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from stare_megatron.errors import UserError
from stare_megatron.host.files import disguise, read_object
from stare_megatron.models.entries import entries, hf_tensors
from stare_megatron.models.layout import element_bytes
from stare_megatron.models.shape import ModelShape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What safetensors calls the dtypes that weights come in.
DTYPES = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Written by old exports of rotary embeddings; computed from the configuration since.
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
_UNREAD = (".bin", ".pt", ".pth", ".gguf", ".h5")
_AGAIN = "fetch or convert the checkpoint again"
_BLOCK = 1 << 24  # bytes compared at a time


@dataclass(frozen=True)
class Stored:
    """What the header of `file` says of a tensor; `dtype` as safetensors calls it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of the weights in a folder.

    Raises:
        UserError: no safetensors weights, two sets of them, a malformed or stale index, a damaged file.
    """
    index = folder / INDEX
    placed = _placed(folder, index) if index.is_file() else {}
    found: dict[str, Stored] = {}
    for file in sorted(set(placed.values())) or [_single(folder)]:
        for name, stored in _header(folder / file).items():
            if name in found:
                raise UserError(f"{folder}: the tensor {name!r} is in {found[name].file} and in {file}; {_AGAIN}")
            found[name] = stored
    for name, file in placed.items():
        if name not in found or found[name].file != file:
            there = f"it is in {found[name].file}" if name in found else "it is in no file"
            raise UserError(f"{index}: places the tensor {name!r} in {file}, but {there}; {_AGAIN}")
    return found


def _single(folder: Path) -> str:
    """The one file, where there is no index."""
    others = sorted(path.name for path in folder.glob("*.safetensors") if path.name != SINGLE)
    if not (folder / SINGLE).is_file():
        unread = next((p.name for p in sorted(folder.glob("*")) if p.suffix in _UNREAD), "")
        why = f"; {unread + ' is not read, ' if unread else ''}save the checkpoint as safetensors"
        if others:
            why = f", which would say what {_some(others)} hold; {_AGAIN}"
        elif (folder / SINGLE).is_symlink():
            why = f": the former is a link to nothing; {_AGAIN}"
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there{why}")
    if others:
        raise UserError(
            f"{folder}: two sets of weights: {SINGLE}, which transformers reads, and {_some(others)}, which vLLM reads "
            f"too, for there is no {INDEX}; move what is not the model's away"
        )
    return SINGLE


def _placed(folder: Path, index: Path) -> Mapping[str, str]:
    """Tensor -> file, as the index says."""
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise UserError(f"{index}: not an index of safetensors files (no table `weight_map` of names); {_AGAIN}")
    files = sorted(set(placed.values()))
    outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
    if outside:
        raise UserError(f"{index}: names {outside[0]!r:.60}, which is no safetensors file of its folder; {_AGAIN}")
    absent = [file for file in files if not (folder / file).is_file()]
    if (folder / SINGLE).is_file() and files != [SINGLE]:
        gone = f" ({len(absent)} of them missing)" if absent else ""
        raise UserError(
            f"{folder}: two sets of weights: {SINGLE}, which transformers reads, and the {len(files)} files that "
            f"{INDEX} lists{gone}, which vLLM reads; remove {SINGLE}, or the index and its files, whichever is not the "
            "model's"
        )
    if absent:
        raise UserError(
            f"{folder / absent[0]}: missing, but listed in {INDEX} ({len(absent)} of {len(files)} files); {_AGAIN}"
        )
    return placed


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _header(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="np") as file:
            views = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118
            return {name: Stored(path.name, view.get_dtype(), tuple(view.get_shape())) for name, view in views}
    except (SafetensorError, OSError) as e:
        try:
            what = disguise(path)
        except OSError as unreadable:
            what = f"cannot read the weights: {unreadable.strerror}"
        what = what or f"cannot read the weights, truncated or damaged: {e}; {_AGAIN}"
        raise UserError(f"{path}: {what}") from e


def check(folder: Path, shape: ModelShape) -> dict[str, Stored]:
    """The headers, found to be those of the model: names, shapes and dtypes, and a tied head that is the embedding.

    Raises:
        UserError: as `read_headers`; a tensor that is missing, unknown, of another shape or of a dtype that is not
            read.
    """
    found = read_headers(folder)
    check_names(folder, found, shape)
    if shape.tied and _HEAD in found and not _same(folder, found[_EMBEDDING], found[_HEAD]):
        raise UserError(
            f"{folder}: config.json says tie_word_embeddings = true, but lm_head.weight differs from the embedding; "
            "set it to false if the head is the model's"
        )
    return found


def check_names(folder: Path, found: Mapping[str, Stored], shape: ModelShape) -> None:
    """Whether headers are the model's. A copy of the embedding as the head of a tied model is nothing new.

    Raises:
        UserError: as `check`, but for the values of a tied head.
    """
    known = {_HEAD} if shape.tied else set()
    for name, want in hf_tensors(shape):
        known.add(name)
        _check_tensor(folder, found, name, want)
    for name in found:
        if name not in known and not name.endswith(_HARMLESS_SUFFIX):
            raise UserError(
                f"{folder}: the tensor {name!r} has no place in the architecture of config.json; is this a checkpoint "
                "of another model?"
            )


def _check_tensor(folder: Path, found: Mapping[str, Stored], name: str, want: tuple[int, ...]) -> None:
    if name not in found:
        raise UserError(f"{folder}: the tensor {name!r} is missing from the checkpoint")
    have = found[name]
    check_dtype(folder, name, have)
    if have.shape != want:
        raise UserError(
            f"{folder}: {name!r} has shape {list(have.shape)}, config.json asks for {list(want)}; a checkpoint of "
            "another model?"
        )


def check_dtype(folder: Path, name: str, stored: Stored) -> None:
    """Raises: UserError: a dtype that is not read, such as those of quantised weights."""
    if stored.dtype not in DTYPES:
        raise UserError(f"{folder}: {name!r} is stored as {stored.dtype}; only {', '.join(DTYPES)} are read")


def _same(folder: Path, one: Stored, other: Stored) -> bool:
    """Whether two tensors that fit the model are the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (folder / one.file).open("rb") as a, (folder / other.file).open("rb") as b:
        left, _ = _seek(a, _EMBEDDING), _seek(b, _HEAD)
        while left > 0:
            if a.read(min(left, _BLOCK)) != b.read(min(left, _BLOCK)):
                return False
            left -= _BLOCK
    return True


def _seek(file: IO[bytes], name: str) -> int:
    """Go to where a tensor begins in a safetensors file that has been found whole; returns its bytes."""
    start = 8 + int.from_bytes(file.read(8), "little")
    begin, end = json.loads(file.read(start - 8))[name]["data_offsets"]
    file.seek(start + begin)
    return end - begin


@functools.lru_cache(maxsize=64)
def parameters(shape: ModelShape) -> int:
    """Number of the model's parameters; a tied head is no further one."""
    return sum(math.prod(want) * entry.experts(shape) for entry in entries(shape) for want in entry.wants(shape))


@functools.lru_cache(maxsize=64)
def engine_bytes(shape: ModelShape, dtype: str, quantization: str) -> int:
    """What an engine keeps of the model. `quantization`: `inference.quantization`; float8 is of the layers' matrices,
    with a float32 scale for each output."""
    byte = element_bytes(dtype)
    size = parameters(shape) * byte
    if quantization == "none":
        return size
    matrices = [
        want for entry in entries(shape) if entry.layer is not None for want in entry.wants(shape) if len(want) == 2
    ]
    return size - sum((byte - 1) * math.prod(want) - 4 * want[0] for want in matrices)
