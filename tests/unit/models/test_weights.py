"""Which files of a folder are the weights: one answer, transformers' and vLLM's, or a refusal that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stare_megatron.errors import UserError
from stare_megatron.models import weights
from stare_megatron.models.entries import hf_names
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shards import Checkpoint
from tests.properties import NUMBERS, SCALARS, TEXT, bounded, nested

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make(folder: Path, *, shards: bool = False, **fields: Any) -> Path:
    """A small model, in one file or in two with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    held = {name: torch.randn(want) for name, want in hf_names(read_hf_config(folder)).items()}
    if not shards:
        save_file(held, folder / "model.safetensors")
        return folder
    names = list(held)
    placed = {name: SHARDS[i >= 5] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: held[name] for name in names if placed[name] == shard}, folder / shard)
    index(folder, placed)
    return folder


def index(folder: Path, placed: Any, **more: Any) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed} | more)
    (folder / "model.safetensors.index.json").write_text(text)


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def check(folder: Path) -> dict[str, weights.Stored]:
    return weights.check(folder, read_hf_config(folder))


def said(folder: Path) -> str:
    with pytest.raises(UserError) as e:
        check(folder)
    assert str(folder) in str(e.value)
    assert str(e.value).isprintable(), e.value
    return str(e.value)


@pytest.mark.parametrize("shards", [False, True])
def test_a_whole_folder_and_one_of_links(tmp_path: Path, shards: bool) -> None:
    """The hub's cache holds links to files whose names say nothing."""
    folder = make(tmp_path / "a", shards=shards)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../blobs/{i:040x}")
    assert check(folder) == check(snapshot)
    files = {stored.file for stored in Checkpoint(snapshot).headers.values()}
    assert files == set(SHARDS if shards else ("model.safetensors",))
    name = "model.norm.weight"
    assert torch.equal(Checkpoint(folder).read(name, (16,)), Checkpoint(snapshot).read(name, (16,)))


def test_files_beside_the_weights_that_nobody_reads(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", shards=True)
    shutil.copy(folder / SHARDS[0], folder / "consolidated.safetensors")  # vLLM reads what the index lists
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert check(folder)["model.norm.weight"].file == SHARDS[1]
    whole = make(tmp_path / "b")
    index(whole, dict.fromkeys(hf_names(read_hf_config(whole)), "model.safetensors"))
    check(whole)


def test_a_tensor_the_index_leaves_out_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", shards=True)
    placed = weight_map(folder)
    del placed["model.norm.weight"]
    index(folder, placed)
    assert check(folder)["model.norm.weight"].file == SHARDS[1]


@pytest.mark.parametrize(
    "second", [SHARDS[0], "model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"]
)
def test_two_sets_without_an_index(tmp_path: Path, second: str) -> None:
    folder = make(tmp_path / "a")
    shutil.copy(folder / "model.safetensors", folder / second)
    assert f"two sets of weights: model.safetensors, which transformers reads, and {second}" in said(folder)


def test_two_sets_with_an_index(tmp_path: Path) -> None:
    folder = make(make(tmp_path / "a", shards=True))
    assert "and the 2 files that model.safetensors.index.json lists, which vLLM reads" in said(folder)
    for shard in SHARDS:
        (folder / shard).unlink()
    assert "the 2 files that model.safetensors.index.json lists (2 of them missing)" in said(folder)
    index(folder, {"model.norm.weight": "model.safetensors", "lm_head.weight": SHARDS[0]})
    assert "two sets of weights" in said(folder)


def test_no_weights(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    shutil.move(folder / "model.safetensors", folder / SHARDS[0])
    assert f"which would say what {SHARDS[0]} hold" in said(folder)
    (folder / SHARDS[0]).unlink()
    assert "save the checkpoint as safetensors" in said(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is not read, save the checkpoint as safetensors" in said(folder)
    (folder / "model.safetensors").symlink_to("gone")
    assert "a link to nothing" in said(folder)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "not a JSON object"),
        ('"x"', "not a JSON object"),
        ("", "the file is empty"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (LFS.decode(), "a Git LFS pointer"),
        ("\xff", "not UTF-8"),
        ("{}", "no table `weight_map`"),
        ('{"weight_map": {}}', "no table `weight_map`"),
        ('{"weight_map": [1]}', "no table `weight_map`"),
        ('{"weight_map": {"a": 1}}', "no table `weight_map`"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "names '../b.safetensors', which is no safetensors file of its"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
        ('{"weight_map": {"a": ""}}', "names ''"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "names 'pytorch_model.bin'"),
        ('{"weight_map": {"a": "sub/x.safetensors"}}', "names 'sub/x.safetensors'"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors: missing, but listed in"),
    ],
)
def test_a_malformed_index(tmp_path: Path, text: str, why: str) -> None:
    folder = make(tmp_path / "a", shards=True)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert why in said(folder)


def test_an_index_that_is_not_of_these_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", shards=True)
    placed = weight_map(folder)
    index(folder, placed | {"model.norm.weight": SHARDS[0]})
    assert f"places the tensor 'model.norm.weight' in {SHARDS[0]}, but it is in {SHARDS[1]}" in said(folder)
    index(folder, placed | {"model.extra": SHARDS[0]})
    assert f"places the tensor 'model.extra' in {SHARDS[0]}, but it is in no file" in said(folder)
    index(folder, placed)
    held = load_file(folder / SHARDS[0])
    save_file(held | {"model.norm.weight": torch.ones(16)}, folder / SHARDS[0])
    assert f"the tensor 'model.norm.weight' is in {SHARDS[0]} and in {SHARDS[1]}" in said(folder)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "cannot read the weights, truncated or damaged"),
        (b"abc", "cannot read the weights, truncated or damaged"),
        (b"\0" * 8, "cannot read the weights, truncated or damaged"),
        (b"\xff" * 64, "cannot read the weights, truncated or damaged"),
        (b"\x04\0\0\0\0\0\0\0nope", "cannot read the weights, truncated or damaged"),
        (b"\x02\0\0\0\0\0\0\0[]", "cannot read the weights, truncated or damaged"),
        (b"\x02\0\0\0\0\0\0\0{}", "is missing from the checkpoint"),
        (LFS, "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
    ids=repr,
)
def test_a_damaged_file(tmp_path: Path, content: bytes, why: str) -> None:
    folder = make(tmp_path / "a")
    (folder / "model.safetensors").write_bytes(content)
    assert why in said(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda held: held.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda held: held.update({"model.norm.bias": torch.ones(16)}), "'model.norm.bias' has no place"),
        (lambda held: held.update({"model.norm.weight": torch.ones(17)}), "has shape [17], config.json asks for [16]"),
        (lambda held: held.update({"model.norm.weight": torch.ones(16).char()}), "'model.norm.weight' is stored as I8"),
        (
            lambda held: held.update({"model.norm.weight": torch.ones(16).to(torch.float8_e4m3fn)}),
            "'model.norm.weight' is stored as F8_E4M3; only F64, F32, F16, BF16 are read",
        ),
    ],
)
def test_weights_of_another_model(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], why: str) -> None:
    folder = make(tmp_path / "a")
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")
    assert why in said(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_tied_head_is_the_embedding_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = make(tmp_path / "a", tie_word_embeddings=True)
    held = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    head = held["model.embed_tokens.weight"].clone()
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(held | computed | {"lm_head.weight": head}, folder / "model.safetensors")
    check(folder)
    head[19, 15] += 1
    save_file(held | {"lm_head.weight": head}, folder / "model.safetensors")
    assert "tie_word_embeddings = true, but lm_head.weight differs from the embedding" in said(folder)
    save_file(held | {"lm_head.weight": head[:10]}, folder / "model.safetensors")
    assert "lm_head.weight differs" in said(folder)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"hidden_size": 0}, "hidden_size = 0 should be from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 should be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 should be"),
        ({"num_key_value_heads": -2}, "num_key_value_heads = -2 should be"),
        ({"num_attention_heads": 32, "num_key_value_heads": 1}, "head_dim = 0 should be"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 should be at most"),
        ({"vocab_size": 10**40}, "vocab_size = 10000000000000000000 should be from 1"),
        ({"intermediate_size": True}, "intermediate_size = True should be of type int"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan should be a finite number"),
        ({"rms_norm_eps": 10**400}, "should be of type float"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0 should be positive"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor = inf should be a finite number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, "factor = 1e+300"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' should be of type dict"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0 should be"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM' should be a list"),
        ({"architectures": 5}, "architectures = 5 should be a list"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not supported"),
    ],
)
def test_a_configuration_of_no_model(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields))
    with pytest.raises(UserError) as e:
        read_hf_config(tmp_path)
    assert why in str(e.value)
    assert "config.json" in str(e.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make(tmp_path_factory.mktemp("whole"), shards=True, tie_word_embeddings=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def attempt(folder: Path, files: dict[str, bytes]) -> None:
    """What is checked is right or refused by name, and what is found right can be read."""
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    try:
        found = check(folder)
        weights.parameters(read_hf_config(folder))
    except UserError as e:
        said = str(e)
    else:
        file = Checkpoint(folder)
        for name in found:
            file.read(name, file.info(name).shape)
        return
    assert str(folder) in said
    assert "\n" not in said
    assert said.encode()


JSON = nested(SCALARS)


@bounded(500)
@given(st.data())
def test_flipped_bytes_and_cut_files(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[name])
    at = data.draw(st.integers(0, min(len(raw), 900) - 1))  # of the headers
    end = data.draw(st.sampled_from([at + 1, at + 4, len(raw)]))
    raw[at:end] = data.draw(st.binary(max_size=4))
    attempt(tmp_path_factory.getbasetemp() / "flipped", files | {name: bytes(raw)})


@bounded(500)
@given(st.data())
def test_fields_of_any_value(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    tree = json.loads(files[name])
    inner = tree if name == "config.json" or data.draw(st.booleans()) else tree["weight_map"]
    keys = st.sampled_from(sorted(inner)) | TEXT | st.sampled_from(["rope_scaling", "rope_parameters", "layer_types"])
    rope = st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "low_freq_factor"]), SCALARS)
    inner |= data.draw(st.dictionaries(keys, JSON | NUMBERS | rope, max_size=2))
    for key in data.draw(st.sets(st.sampled_from(sorted(inner)), max_size=1)):
        inner.pop(key)
    attempt(tmp_path_factory.getbasetemp() / "fields", files | {name: json.dumps(tree).encode()})
