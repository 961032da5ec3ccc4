"""Each patch has two tests: the upstream is still broken without it, and it mends what is broken."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import stare_megatron_patches
from stare_megatron_patches import PATCHES, Patch, PatchError, cpu_source, expect
from stare_megatron_patches.import_hook import PatchingLoader

PATCH_FOLDER = Path(stare_megatron_patches.__file__).parent
LEDGER = stare_megatron_patches.load()
VERSION = importlib.metadata.version("megatron-core")
PRESENT = [n for n in PATCHES if VERSION in SpecifierSet(LEDGER[n].versions, prereleases=True)]
# The probes of the optimizer need a CPU on which Megatron-Core runs at all, so they are left out alone.
ALONE = ("torch_adam_step", "bucket_padding")


@functools.cache
def probe(*excluded: str) -> dict[str, str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "STARE_DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "probes.py"), *excluded],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PRESENT)
@pytest.mark.xfail(strict=True, reason="the upstream problem; if this passes, delete the patch")
def test_upstream_is_mended(name: str) -> None:
    excluded = (name,) if name in ALONE else PATCHES
    fault = probe(*excluded)[name]
    assert not fault, fault


@pytest.mark.parametrize("name", PRESENT)
def test_patch_mends(name: str) -> None:
    fault = probe()[name]
    assert not fault, fault


def test_ledger_is_complete() -> None:
    """Every file is a patch in the ledger or part of its machinery, is short, and is in the README's table."""
    machinery = {"__init__", "import_hook", "cpu_standin"}
    files = {p.stem: p for p in PATCH_FOLDER.glob("*.py")}
    assert set(files) - machinery == set(PATCHES)
    readme = (PATCH_FOLDER / "README.md").read_text()
    for name in PATCHES:
        assert len(files[name].read_text().splitlines()) < 100, name
        assert f"`{name}`" in readme, name
        assert f"`{LEDGER[name].versions}`" in readme, name


def test_source_that_changed_is_refused() -> None:
    def upstream() -> int:
        return 1

    expect(upstream, "return 1")
    with pytest.raises(PatchError, match="return 2"):
        expect(upstream, "return 2")
    with pytest.raises(PatchError, match="names CUDA no more"):
        cpu_source.rewrite(ast.parse("x = 1"), "megatron.core.tensor_parallel.random")


def test_unknown_version_and_early_import_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Behind a copy of meta_path without a hook that another test of this process may have left there.
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "PatchingFinder"])
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.99")
    with pytest.raises(PatchError, match=r"0\.99 is outside of"):
        stare_megatron_patches.apply("megatron-core")
    monkeypatch.undo()
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "PatchingFinder"])
    monkeypatch.setitem(sys.modules, "megatron.core", object())
    with pytest.raises(PatchError, match="imported before"):
        stare_megatron_patches.apply("megatron-core")


SOURCE = '''"""Docs with "cuda"."""
from __future__ import annotations
import torch
kind = "cuda"
if p.type() in ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]: pass
a = torch.empty(2, device=torch.cuda.current_device(), pin_memory=True)
b = a.cuda(non_blocking=True).pin_memory()
'''


def test_rewrite_for_the_cpu() -> None:
    text = ast.unparse(cpu_source.rewrite(ast.parse(SOURCE), "megatron.core.x"))
    assert text.splitlines() == [
        '"""Docs with "cuda"."""',
        "from __future__ import annotations",
        "from stare_megatron_patches.cpu_standin import cuda as __cpu_standin__",
        "import torch",
        "kind = 'cpu'",
        "if p.type() in ['torch.FloatTensor', 'torch.BFloat16Tensor']:",
        "    pass",
        "a = torch.empty(2, device=__cpu_standin__.current_device())",
        "b = a.cpu()",
    ]


def test_rewritten_code_is_kept_until_its_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    file, rewritten = tmp_path / "kind.py", []

    def rewrite(tree: ast.Module, name: str) -> ast.Module:
        rewritten.append(name)
        return cpu_source.rewrite(tree, name)

    def kind() -> object:
        code = PatchingLoader(
            "kind", str(file), [dataclasses.replace(LEDGER["cpu_source"], rewrite=rewrite)], []
        ).get_code("kind")
        assert code is not None
        found: dict[str, object] = {}
        exec(code, found)
        return found["kind"]

    file.write_text("kind = 'cuda'")
    assert (kind(), kind(), rewritten) == ("cpu", "cpu", ["kind"])
    file.write_text("kind = 'cuda', 2")
    assert (kind(), kind(), rewritten) == (("cpu", 2), ("cpu", 2), ["kind"] * 2)
    (cache,) = (tmp_path / "__pycache__").iterdir()
    for damaged in (cache.read_bytes()[:-9], cache.read_bytes()[:32], b""):
        cache.write_bytes(damaged)
        rewritten.clear()
        assert (kind(), kind(), rewritten) == (("cpu", 2), ("cpu", 2), ["kind"])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cache.unlink()
    assert (kind(), cache.exists()) == (("cpu", 2), False)


def test_patch_needs_no_megatron() -> None:
    assert all(isinstance(patch, Patch) for patch in LEDGER.values())
