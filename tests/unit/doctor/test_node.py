"""What a node tells of itself, and faults made for real: files, folders, packages, names, sockets."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from stare_megatron import doctor
from stare_megatron.doctor import checks, node, survey
from stare_megatron.doctor.facts import Ask, ClusterFacts, NodeFacts, Resources
from stare_megatron.errors import UserError
from stare_megatron.host.packages import MISSING
from stare_megatron.host.ports import connect_error
from tests.configs import configuration, small_model

SMI = """#!/bin/sh
case "$*" in
  --query-gpu*) printf 'NVIDIA H100 80GB HBM3, 81559, 40000, Exclusive_Process, 580.1, GPU-a\\nNVIDIA H100 80GB HBM3, 81559, 4, Default, 580.1, GPU-b\\n';;
  topo*) printf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\nGPU1\\tNV18\\t X \\n';;
  *) echo '| NVIDIA-SMI 580.1   Driver Version: 580.1   CUDA Version: 12.2 |';;
esac
"""  # noqa: E501


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = small_model(tmp_path / "model", weights=False)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def ask(tmp_path: Path, model: Path) -> Ask:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "nonce").write_text("n")
    return Ask("id", "127.0.0.1", {f"model.path = {model}": model}, model, shared, "n", full=False)


def problems(found: NodeFacts, driver: NodeFacts | None = None, full: bool = False) -> list[str]:
    """Of a machine of two, this one and its twin under another address."""
    here = dataclasses.replace(found, ray=Resources(4, 4, len(found.gpus), len(found.gpus), 0))
    twin = dataclasses.replace(here, address="127.0.0.1")
    driver = driver or dataclasses.replace(found, shared_error="")
    facts = ClusterFacts("auto", "cuda" if found.gpus else "cpu", driver, (here, twin)[: 1 + full])
    return [p.check for p in checks.find(facts, None)]


def test_a_healthy_machine_in_full(ask):
    found = node.gather(dataclasses.replace(ask, full=True))
    assert found.host == socket.gethostname()
    assert found.versions["ray"] not in ("", MISSING)
    assert found.versions["stare_megatron"].startswith("0.")
    assert "(code " in found.versions["stare_megatron"]
    assert found.interface == "lo"
    assert (found.shared_visible, found.shared_error) == (True, "")
    assert (ask.shared / "done-id").read_text() == "n"  # type: ignore[operator]
    assert found.weight_bytes == 100
    assert found.cpus > 0
    assert found.memory_bytes > 2**30
    assert not {"versions", "shared_folder", "shared_writable", "paths_missing"} & set(problems(found))


def test_a_folder_that_is_not_shared(ask, tmp_path):
    elsewhere = dataclasses.replace(ask, shared=tmp_path / "elsewhere")
    assert problems(node.gather(elsewhere)) == ["shared_folder"]
    assert problems(node.gather(dataclasses.replace(ask, nonce="another"))) == ["shared_folder"]


def test_a_reference_policy_is_looked_for_where_one_is_used(tmp_path, model):
    gone = tmp_path / "gone"

    def asked(coefficient: float) -> dict[str, str]:
        kl = {"kl": {"coefficient": coefficient, "reference": str(gone)}}
        return survey.short(configuration(model={"path": str(model)}, algorithm=kl), None).driver.paths

    key = f"algorithm.kl.reference = {gone}"
    assert key not in asked(0.0)
    assert asked(0.1)[key] == MISSING


def test_a_local_folder(ask, tmp_path):
    local = tmp_path / "local/stare"
    found = node.gather(dataclasses.replace(ask, local=local))
    assert (found.local_error, found.shared_error, list(local.iterdir())) == ("", "", [])
    local.rmdir()
    local.write_text("a file")
    assert node.gather(dataclasses.replace(ask, id="2", local=local)).local_error == "File exists"
    assert problems(dataclasses.replace(found, local_error="File exists")) == ["local_folder"]


def test_a_shared_file_system_without_links(ask, tmp_path, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert problems(node.gather(ask)) == []
    assert problems(node.gather(dataclasses.replace(ask, id="2", local=tmp_path))) == ["shared_writable"]


def test_marks_show_who_has_the_same_folder(tmp_path):
    for number in "ab":
        node.mark(tmp_path, "n", number)
    node.mark(tmp_path / "missing", "n", "c")
    assert (node.marks(tmp_path, "n"), node.marks(tmp_path, "m")) == (["a", "b"], [])
    node.unmark(tmp_path, "n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["nothing", "error"])
def test_renames_that_do_not_replace(ask, monkeypatch, broken):
    def replace(source: Any, target: Any) -> None:
        if broken == "error":
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "replace", replace)
    assert problems(node.gather(ask)) == ["shared_writable"]


def test_a_model_that_is_missing_or_another(ask, model):
    ask = dataclasses.replace(ask, shared=None)
    before = node.gather(ask)
    (model / "model.safetensors").write_bytes(b"x" * 99)
    assert problems(node.gather(ask), driver=before) == ["paths_differ"]
    (model / "model.safetensors").write_bytes(b"x" * 100)
    (model / "config.json").write_text(json.dumps({"vocab_size": 9}))
    assert problems(node.gather(ask), driver=before) == ["paths_differ"]
    model.rename(model.with_name("gone"))
    assert problems(node.gather(ask), driver=before) == ["paths_missing"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("raise FileNotFoundError('libtransformer_engine.so')", "FileNotFoundError: libtransformer_engine.so"),
        ("import ctypes; ctypes.CDLL('/nowhere/te.so')", "OSError: /nowhere/te.so"),
        ("from torch_of_another_day import symbol", "ModuleNotFoundError: No module named 'torch_of_another_day'"),
        ("", ""),
    ],
)
def test_transformer_engine_is_tried_by_importing_it(ask, tmp_path, monkeypatch, text, error):
    package = tmp_path / "packages/transformer_engine"
    (package / "pytorch").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "pytorch/__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)  # hidden, where ranks were imported
    found = node.gather(dataclasses.replace(ask, full=True))
    assert found.transformer_engine.startswith(error)
    assert ("transformer_engine" in problems(found)) is bool(error)


def test_a_host_name_that_resolves_to_loopback(ask, monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found = dataclasses.replace(node.gather(dataclasses.replace(ask, full=True)), address="10.0.0.1")
    assert "host_name" in problems(found, full=True)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = dataclasses.replace(node.gather(dataclasses.replace(ask, full=True)), address="10.0.0.1")
    assert "host_name" not in problems(found, full=True)


def test_secrets_are_compared_and_not_told(ask, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("HF_HOME", "/hf")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
    found = node.gather(ask)
    assert found.environment["HF_HOME"] == "/hf"
    assert "hf_abc" not in str(found)
    assert "sesame" not in str(found)
    assert found.token
    monkeypatch.setenv("HF_TOKEN", "hf_abd")
    assert node.gather(ask).environment["HF_TOKEN"] != found.environment["HF_TOKEN"]


def test_what_nvidia_smi_tells(ask, tmp_path, monkeypatch):
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = dataclasses.replace(node.gather(dataclasses.replace(ask, full=True)), torch_cuda="13.0")
    assert [g.used_bytes for g in found.gpus] == [40000 * 2**20, 4 * 2**20]
    assert found.gpus[0].bytes == 81559 * 2**20
    assert (found.gpu_driver, found.driver_cuda, found.nvlink) == ("580.1", "12.2", True)
    assert {"gpu_memory", "compute_mode", "cuda_build"} <= set(problems(found))
    for named, used in (("1", [4]), ("GPU-b,0", [4, 40000]), ("", [])):  # of which Ray was shown a part
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        shown = node.gather(dataclasses.replace(ask, full=True))
        assert [g.used_bytes for g in shown.gpus] == [n * 2**20 for n in used]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    found = node.gather(dataclasses.replace(ask, full=True))
    assert found.gpu_error == "Failed to initialize NVML: Driver/library version mismatch"
    assert "gpu_driver" in problems(found)


def test_a_port_where_nothing_listens():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        target = s.getsockname()[:2]
        assert connect_error(target) == "Connection refused"
        s.listen()
        assert connect_error(target) == ""


def test_a_stale_address_is_told_without_asking_ray(monkeypatch, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        facts = survey.full(None, configuration(cluster={"address": "auto"}).cluster)
    found = checks.find(facts, None)
    assert [p.check for p in found if p.stops] == ["no_answer"]
    assert f"RAY_ADDRESS = 127.0.0.1:{port}" in str(found[0])


class TestARunOnOneMachine:
    """The short form, which asks no Ray there."""

    def config(self, model: Path, folder: Path) -> Any:
        return configuration(model={"path": str(model)}, run={"dir": str(folder)})

    def test_that_is_healthy(self, model, tmp_path):
        doctor.short(self.config(model, tmp_path), tmp_path / "runs/unit/logs")
        assert not (tmp_path / "runs").exists()

    def test_whose_folder_cannot_be_made(self, model, tmp_path):
        (tmp_path / "runs").write_text("a file")
        with pytest.raises(UserError, match=r"runs/unit fails: Not a directory; choose a run\.dir"):
            doctor.short(self.config(model, tmp_path), tmp_path / "runs/unit")

    def test_whose_model_is_gone(self, model, tmp_path):
        with pytest.raises(UserError, match=r"model\.path = .*nowhere is not there; copy or mount"):
            doctor.short(self.config(tmp_path / "nowhere", tmp_path), None)

    def test_that_names_an_interface_it_has_not(self, model, tmp_path, monkeypatch):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonesuch0")
        with pytest.raises(UserError, match=r"GLOO_SOCKET_IFNAME = nonesuch0 names no interface there; export"):
            doctor.short(self.config(model, tmp_path), None)
