"""Distributed checkpoints read pickles: whatever stands in their files, nothing is run, and faults are one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from stare_megatron.convert.run import Options, convert
from stare_megatron.convert.torch_dist import COMMON, FORMAT, INDEX, Box, TorchDist
from stare_megatron.errors import UserError
from tests.properties import SCALARS, TEXT, bounded, nested
from tests.unit.convert import hf_folders

DATA = "__0_0.distcp"
# What running code cannot do without. An audit hook cannot be taken away again: it counts while `watched` holds a list.
WATCHED = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "code.")
watched: list[list[str]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if watched and (event.startswith(WATCHED) or (event == "open" and args[1] not in ("r", "rb", None))):
        watched[-1].append(f"{event} {args!r:.80}")


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    convert(Options(hf_folders.make(folder / "hf"), folder / "mcore"), Console(quiet=True))
    return folder / "mcore"


def read(folder: Path) -> str:
    """Read all of it; what it is refused with, or ""."""
    seen: list[str] = []
    try:
        watched.append(seen)
        try:
            dist = TorchDist(folder)
        finally:
            watched.pop()
        for key, whole in dist.tensors.items():
            if whole.bytes < 1 << 20:
                dist.read(key, Box((0,) * len(whole.shape), whole.shape))
        dist.common()
    except UserError as e:
        said = str(e)
        assert "\n" not in said
        assert said.encode("utf-8", "surrogateescape")
        return said
    finally:
        assert not seen
    return ""


def read_with(saved: Path, name: str, content: bytes) -> str:
    """As `read`, of a copy in which one file holds something else."""
    copy = saved.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for file in saved.iterdir():
        if file.is_file() and file.name != name:
            os.link(file, copy / file.name)
    (copy / name).write_bytes(content)
    return read(copy)


def test_what_is_whole_is_read(saved: Path) -> None:
    assert read(saved) == ""


def test_what_is_common_may_be_among_the_tensors(tmp_path: Path) -> None:
    """As Megatron-Core 0.19 writes it, with torch."""
    content: dict[str, Any] = {"common_state/shard_0_1": [{"step": 3}], "weight": torch.ones(2)}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    torch.distributed.checkpoint.save(content, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    (tmp_path / FORMAT).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    assert read(tmp_path) == ""
    assert TorchDist(tmp_path).common() == {"step": 3}
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-2000])
    assert "truncated" in read(tmp_path)


Changes = list[tuple[str, int, int]]
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "flip", "insert", "drop", "cut"]), st.integers(0, 2**31), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def changed(content: bytes, changes: Changes) -> bytes:
    data = bytearray(content)
    for how, place, byte in changes:
        i = place % max(1, len(data))
        if how == "cut":
            del data[i:]
        elif how == "drop":
            del data[i : i + 1 + byte % 8]
        elif how == "insert" or not data:
            data.insert(i, byte)
        else:
            data[i] = data[i] ^ (1 << byte % 8) if how == "flip" else byte
    return bytes(data)


@bounded(150)
@given(CHANGES)
def test_a_damaged_index(saved: Path, changes: Changes) -> None:
    read_with(saved, INDEX, changed((saved / INDEX).read_bytes(), changes))


@pytest.mark.parametrize("name", [COMMON, DATA, FORMAT])
def test_other_damaged_files(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()

    @bounded(40)
    @given(CHANGES)
    def check(changes: Changes) -> None:
        read_with(saved, name, changed(content, changes))

    check()


ANY = nested(SCALARS)
SIZES = st.lists(st.integers(-2, 8), max_size=3).map(torch.Size) | st.just(torch.Size([64])) | ANY
CHUNKS = st.builds(ChunkStorageMetadata, SIZES, SIZES) | ANY
TENSORS = st.builds(
    TensorStorageMetadata,
    st.builds(TensorProperties, st.sampled_from([torch.float32, torch.int64])) | ANY,
    SIZES,
    st.lists(CHUNKS, max_size=2) | ANY,
)
PLACES = st.builds(
    _StorageInfo,
    st.sampled_from([DATA, "../../x", "/etc/passwd", ""]) | ANY,
    st.integers() | ANY,
    st.integers(0, 999) | ANY,
)


@bounded(150)
@given(
    st.dictionaries(st.sampled_from(["a", "b"]), TENSORS | st.just(BytesStorageMetadata()) | ANY, max_size=2) | ANY,
    st.lists(PLACES | ANY, max_size=4) | ANY,
)
@example({"a": TensorStorageMetadata(TensorProperties(), torch.Size([10**12]), [])}, [])
def test_an_index_of_anything(saved: Path, tensors: Any, places: Any) -> None:
    """Well-formed objects that say what no checkpoint says."""
    stored = places
    if isinstance(tensors, dict) and isinstance(places, list):
        chunks = [
            (key, tuple(chunk.offsets))
            for key, value in tensors.items()
            if isinstance(value, TensorStorageMetadata) and isinstance(value.chunks, list)
            for chunk in value.chunks
            if isinstance(chunk, ChunkStorageMetadata) and isinstance(chunk.offsets, torch.Size)
        ]
        stored = {MetadataIndex(key, torch.Size(at)): place for (key, at), place in zip(chunks, places, strict=False)}
    content = pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=stored))
    read_with(saved, INDEX, content)


def described(whole: list[int], length: int, *chunks: tuple[list[int], list[int]]) -> bytes:
    """An index of one tensor `a` of `whole` size in pieces of so many bytes, each with its offsets and sizes."""
    pieces = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in chunks]
    tensors: Any = {"a": TensorStorageMetadata(TensorProperties(), torch.Size(whole), pieces)}
    stored = {MetadataIndex("a", torch.Size(at)): _StorageInfo(DATA, 0, length) for at, _ in chunks}
    return pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=stored))


@pytest.mark.parametrize("size", [[-1], [4, -1], [0, 1 << 62, 1 << 62], [1 << 62]])
def test_a_size_that_no_tensor_has_is_refused(saved: Path, size: list[int]) -> None:
    assert "which no tensor has" in read_with(saved, INDEX, described(size, 9))


def test_nothing_is_allocated_before_its_pieces_are_known_to_be_there(saved: Path) -> None:
    """4 TiB, in no piece, in half a piece, and in two that lie in a few bytes of a file."""
    many, half = 1 << 40, 1 << 39
    copy = saved.parent / "sizes"
    shutil.copytree(saved, copy, dirs_exist_ok=True)
    for content, said in (
        (described([many], 9), "do not cover the tensor once"),
        (described([many], 9, ([0], [2])), "do not cover the tensor once"),
        (described([many], 9, ([0], [half]), ([half], [half])), "larger than its bytes"),
    ):
        (copy / INDEX).write_bytes(content)
        with pytest.raises(UserError, match=said):
            TorchDist(copy).read("a", Box((0,), (many,)))


@bounded(60)
@given(nested(SCALARS | st.binary(max_size=5)), st.integers(0, 5))
@example(json.loads("[" * 200 + "]" * 200), 0)
def test_a_pickle_of_anything_else(saved: Path, value: Any, protocol: int) -> None:
    assert read_with(saved, INDEX, pickle.dumps(value, protocol=protocol))


DANGEROUS = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("pathlib", "Path.touch"),
    ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
    ("torch.distributed.checkpoint.filesystem", "os.system"),
    ("torch.distributed.checkpoint.filesystem", "Thread"),
    ("torch.distributed.checkpoint._async_process_executor", "_ProcessBasedAsyncCheckpointExecutor"),
    ("torch.distributed.checkpoint.format_utils", "dcp_to_torch_save"),
    ("megatron.core.dist_checkpointing.strategies.filesystem_async", "FileSystemWriterAsync"),
    ("megatron.core.dist_checkpointing.serialization", "load"),
    ("importlib", "import_module"),
]


@pytest.mark.parametrize("name", DANGEROUS, ids=".".join)
@pytest.mark.parametrize("protocol", [0, 4])
def test_names_that_could_run_code_are_not_looked_up(saved: Path, name: tuple[str, str], protocol: int) -> None:
    out = io.BytesIO()
    if protocol:
        for text in name:
            out.write(b"\x8c" + bytes([len(text)]) + text.encode())
        out.write(b"\x93")
    else:
        out.write(f"c{name[0]}\n{name[1]}\n".encode())
    out.write(b"(S'touch ran'\ntR.")
    assert "does not belong in an index" in read_with(saved, INDEX, out.getvalue())


@bounded(60)
@given(TEXT | nested(SCALARS).map(lambda v: json.dumps(v, default=str)))
@example('{"sharded_backend": ["torch_dist"]}')
@example("[" * 100_000)
def test_a_format_of_anything(saved: Path, text: str) -> None:
    assert read_with(saved, FORMAT, text.encode("utf-8", "surrogatepass"))
