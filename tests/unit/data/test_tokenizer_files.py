"""A checkpoint's tokenizer: used as transformers does, or refused by the name of the file at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_megatron.data.tokenizer import first_line, load_tokenizer
from stare_megatron.errors import UserError
from tests import byte_tokenizer
from tests.properties import SCALARS, TEXT, bounded, nested

SIZE = 261  # of the tokenizer's vocabulary
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
FIELDS = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer.make().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": SIZE} | FIELDS))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "temperature": 0.6}))
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, made: dict[str, str]) -> Path:
    write(tmp_path, made)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))


def change(folder: Path, name: str, **fields: Any) -> None:
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def said(folder: Path) -> str:
    with pytest.raises(UserError) as e:
        load_tokenizer(folder)
    assert str(folder) in str(e.value)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_several_ends_of_a_sequence(folder: Path) -> None:
    assert load_tokenizer(folder).eos_token_id == 258
    change(folder, "generation_config.json", eos_token_id=256)
    load_tokenizer(folder)
    change(folder, "config.json", eos_token_id=[256, 258], pad_token_id=-1, bos_token_id=None)
    load_tokenizer(folder)
    (folder / "generation_config.json").unlink()
    load_tokenizer(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["<|im_end|>", [258, "x"], [None], 1.5, True, {"a": 1}, [[258]]], ids=repr)
def test_an_end_that_is_no_id(folder: Path, name: str, value: Any) -> None:
    change(folder, name, eos_token_id=value)
    assert f"{folder}" in said(folder)
    assert name in said(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [SIZE, -2, 10**6, [258, SIZE], 10**400])
def test_an_end_outside_the_vocabulary(folder: Path, name: str, value: Any) -> None:
    change(folder, name, eos_token_id=value)
    assert f"{folder / name}: eos_token_id = " in said(folder)
    assert "is no token of the tokenizer" in said(folder)


def test_ends_that_are_ordinary_tokens(folder: Path) -> None:
    change(folder, "config.json", eos_token_id=5)
    change(folder, "generation_config.json", eos_token_id=[5, 6])
    assert f"{folder / 'config.json'}: eos_token_id = 5 is an ordinary token" in said(folder)
    change(folder, "config.json", eos_token_id=None)
    assert f"{folder / 'generation_config.json'}: eos_token_id = 5 is an ordinary token" in said(folder)
    change(folder, "generation_config.json", eos_token_id=[5, 258])
    load_tokenizer(folder)


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token"])
def test_a_special_token_without_an_id(folder: Path, role: str) -> None:
    """transformers would add it, with the id of a row that was never trained."""
    change(folder, "config.json", vocab_size=SIZE + 20)
    change(folder, "tokenizer_config.json", **{role: "<end>"})
    assert "tokenizer_config.json: the special token '<end>' is not in the vocabulary; it would become" in said(folder)
    change(folder, "tokenizer_config.json", added_tokens_decoder={str(SIZE): {"content": "<end>", "special": True}})
    load_tokenizer(folder)
    change(folder, "tokenizer_config.json", added_tokens_decoder={"270": {"content": "<end>", "special": True}})
    assert "<end>" in said(folder)


@pytest.mark.parametrize("value", [{"content": "<|im_end|>"}, 5, ["<|im_end|>"], True], ids=repr)
def test_an_end_of_another_type(folder: Path, value: Any) -> None:
    change(folder, "tokenizer_config.json", eos_token=value)
    assert "no tokenizer that transformers can load" in said(folder)
    change(folder, "tokenizer_config.json", eos_token=None)
    assert "no end-of-sequence token" in said(folder)


def test_a_message_can_be_written_out(folder: Path) -> None:
    """A half of a surrogate pair, which JSON allows and UTF-8 does not."""
    change(folder, "tokenizer_config.json", extra_special_tokens={"\ud800": 1})
    assert "no tokenizer that transformers can load" in said(folder)
    assert said(folder).encode()
    assert first_line(ValueError("a \ud800 b\nc")) == "a \\ud800 b"
    assert first_line(ValueError()) == "ValueError"


def test_a_tokenizer_of_another_size(folder: Path) -> None:
    change(folder, "config.json", vocab_size=SIZE - 1)
    assert f"the tokenizer has token id {SIZE - 1}, config.json says vocab_size = {SIZE - 1}" in said(folder)
    change(folder, "config.json", vocab_size=2 * SIZE + 1)
    assert f"has {SIZE} tokens, the embedding {2 * SIZE + 1} rows; it is another model's" in said(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', LFS, "\xff", "<!DOCTYPE html>", "cut"])
def test_a_damaged_file_is_named(folder: Path, name: str, text: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2] if text == "cut" else text.encode("latin-1"))
    assert str(folder / name) in said(folder)
    assert ("a Git LFS pointer" in said(folder)) == (text == LFS)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_a_file_that_transformers_cannot_read(folder: Path, name: str) -> None:
    text = {"tokenizer.json": "{}", "config.json": f'{{"vocab_size": {SIZE}, "model_type": 5}}'}.get(
        name, '{"eos_token_id": 258, "max_new_tokens": 0}'
    )
    (folder / name).write_text(text)
    assert "transformers can load" in said(folder)


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "chat_template.jinja", "special_tokens_map.json"])
def test_pointers_beside_the_tokenizer(folder: Path, name: str) -> None:
    (folder / name).write_text(LFS)
    assert f"{folder / name}: a Git LFS pointer" in said(folder)


JSON = nested(SCALARS)
KEYS = [
    *("eos_token", "pad_token", "added_tokens_decoder", "chat_template", "model_max_length", "tokenizer_class"),
    *("extra_special_tokens", "eos_token_id", "bos_token_id", "vocab_size", "model_type", "temperature", "torch_dtype"),
    *("rope_scaling", "architectures", "model", "added_tokens", "pre_tokenizer", "normalizer", "decoder"),
    *("post_processor", "version", "truncation"),
]
FILES = ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"]


@bounded(500)
@given(st.sampled_from(FILES), st.dictionaries(st.sampled_from(KEYS) | TEXT, JSON, min_size=1, max_size=3))
def test_fields_of_any_value(
    tmp_path_factory: pytest.TempPathFactory, made: dict[str, str], name: str, new: Any
) -> None:
    attempt(tmp_path_factory.getbasetemp() / "fields", made | {name: json.dumps(json.loads(made[name]) | new)})


@bounded(500)
@given(st.sampled_from(FILES), st.integers(0, 2**31), st.integers(0, 255), st.booleans())
def test_flipped_bytes_and_cut_files(
    tmp_path_factory: pytest.TempPathFactory, made: dict[str, str], name: str, place: int, byte: int, cut: bool
) -> None:
    raw = bytearray(made[name].encode())
    at = place % len(raw)
    raw[at : len(raw) if cut else at + 1] = bytes([byte])
    attempt(tmp_path_factory.getbasetemp() / "flips", made | {name: raw.decode("latin-1")}, name)


def attempt(folder: Path, files: dict[str, str], raw: str = "") -> None:
    folder.mkdir(exist_ok=True)
    write(folder, files)
    if raw:
        (folder / raw).write_bytes(files[raw].encode("latin-1"))
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as e:
        said = str(e)
    else:
        assert 0 <= tokenizer.eos_token_id < json.loads((folder / "config.json").read_text())["vocab_size"]
        return
    assert str(folder) in said
    assert "\n" not in said
    assert said.encode()
