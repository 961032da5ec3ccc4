"""One answer to a folder of a model: what a start (a resume, an evaluation) refuses, convert and inspect refuse too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stare_megatron.__main__ import main
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.errors import UserError
from stare_megatron.models.families import read_hf_config
from stare_megatron.run import preflight
from tests.unit.convert import hf_folders

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"


def edit(name: str, **fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def tensors(**new: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(load_file(file) | {name.replace("__", "."): value for name, value in new.items()}, file)

    return change


def links(folder: Path) -> None:
    """As the hub's cache has it."""
    blobs = folder.with_name("blobs")
    shutil.move(folder, blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)


def bare(folder: Path) -> None:
    """No tokenizer, and a damaged file that would go along."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id"')


INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SOUND = {
    "whole": lambda folder: None,
    "links": links,
    "several ends": edit("generation_config.json", eos_token_id=[2, 3]),
    "no generation_config.json": lambda folder: (folder / "generation_config.json").unlink(),
}
FAULTY = {
    "byte-order mark": lambda folder: (folder / "config.json").write_bytes(
        b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()
    ),
    "second set": lambda folder: shutil.copy(folder / SINGLE, folder / "model-00001-of-00002.safetensors"),
    "stale index": text(INDEX, '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
    "index of no object": text(INDEX, "[]"),
    "shards without index": lambda folder: shutil.move(folder / SINGLE, folder / "model-00001-of-00002.safetensors"),
    "pytorch_model.bin": lambda folder: shutil.move(folder / SINGLE, folder / "pytorch_model.bin"),
    "weights are a pointer": text(SINGLE, LFS),
    "weights are empty": text(SINGLE, ""),
    "int8": tensors(model__norm__weight=torch.ones(64).char()),
    "another shape": tensors(model__norm__weight=torch.ones(65)),
    "unknown tensor": tensors(model__norm__bias=torch.ones(64)),
    "tied to another head": edit("config.json", tie_word_embeddings=True),
    "config is a pointer": text("config.json", LFS),
    "config is a list": text("config.json", "[]"),
    "size is a text": edit("config.json", hidden_size="64"),
    "quantised": edit("config.json", quantization_config={"bits": 4}),
    "no heads": edit("config.json", num_attention_heads=0),
    "bad torch_dtype": edit("config.json", torch_dtype="float99"),
    "end beyond": edit("config.json", eos_token_id=113),
    "end is a text": edit("generation_config.json", eos_token_id="w2"),
    "ends are ordinary": edit("generation_config.json", eos_token_id=[2, 200]),
    "generation config is cut": text("generation_config.json", '{"eos_token_id"'),
    "no tokenizer, generation config is cut": bare,
    "tokenizer is a pointer": text("tokenizer.json", LFS),
    "tokenizer is {}": text("tokenizer.json", "{}"),
    "unknown eos_token": edit("tokenizer_config.json", eos_token="<end>"),
    "eos_token is a number": edit("tokenizer_config.json", eos_token=2),
    "template is a pointer": text("chat_template.jinja", LFS),
    "larger tokenizer": lambda folder: hf_folders.tokenizer(folder, 120),
}


@pytest.mark.parametrize("name", [*SOUND, *FAULTY])
def test_start_convert_and_inspect_agree(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hf_folders.make(tmp_path / "hf")
    (SOUND | FAULTY)[name](folder)
    answers = {
        "convert": main(["convert", str(folder), str(tmp_path / "mcore"), "--quiet"]),
        "inspect": main(["inspect", str(folder)]),
    }
    said = capsys.readouterr().err.splitlines()
    assert all(str(folder) in line for line in said)
    start = ""
    try:
        preflight.check_weights(folder, read_hf_config(folder))
        load_tokenizer(folder)
    except UserError as e:
        start = f"stare-megatron: {e}"
    assert said == ([start] * 2 if start else [])
    assert (answers, bool(start)) == (dict.fromkeys(answers, 0 if name in SOUND else 2), name in FAULTY)
