"""A dense model family as docs/adding_a_model_family.md adds one: a file and a line, in a copy of the package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contracts.source import ROOT
from tests.guide import blocks

CONFIG = {
    "architectures": ["MineForCausalLM"],
    "model_type": "mine",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 113,
    "max_position_embeddings": 128,
}
CODE = """
import sys
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
import stare_megatron
from stare_megatron.models.entries import entries
from stare_megatron.models.families import read_hf_config

assert Path(stare_megatron.__file__).is_relative_to(sys.argv[1])
shape = read_hf_config(Path(sys.argv[1]))
assert shape.family == "mine", shape
ours = {name: size for e in entries(shape) for name, size in zip(e.names(), e.wants(shape), strict=True)}
twin = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")}))
assert ours == {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
print(len(ours))
"""


@pytest.mark.parts
def test_a_file_and_a_line_are_a_family(tmp_path: Path) -> None:
    """The file of the page, under another name, in a copy: its tensors are those of its twin in transformers."""
    page = blocks("adding_a_model_family")["python"]
    file, line = (text.replace("qwen2", "mine").replace("Qwen2For", "MineFor") for text in page[:2])
    assert page[0] == (ROOT / "stare_megatron/models/qwen2.py").read_text()
    shutil.copytree(ROOT / "stare_megatron", tmp_path / "stare_megatron", ignore=shutil.ignore_patterns("__pycache__"))
    models = tmp_path / "stare_megatron/models"
    (models / "mine.py").write_text(file)
    registry = (models / "families.py").read_text()
    registry = registry.replace("import llama, ", "import llama, mine, ")
    (models / "families.py").write_text(registry.replace('    "qwen3":', f'{line}    "qwen3":'))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-c", f"CONFIG = {CONFIG!r}\n{CODE}", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == 3 + 12 * 2
