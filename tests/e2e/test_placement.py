"""Placement on real placement groups of a Ray whose GPUs are numbers; no process asks for a real one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import programs

ROOT = Path(__file__).parents[2]
SMI = """#!/bin/sh
printf 'NVIDIA H100, 81559, GPU-aa\\nNVIDIA H100, 81559, GPU-bb\\n'
"""


def run(tmp_path: Path, code: str, **environment: str) -> Any:
    """What `code` puts into `out`, in a process with a Ray of its own and a driver that reports two GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(SMI)
    tool.chmod(0o755)
    head = (
        "import json, logging, sys, ray, ray.cluster_utils\n"
        "from stare_megatron.cluster import placement\n"
        "from stare_megatron.errors import UserError\n"
        "from stare_megatron.host import device\n"
        "from tests.configs import configuration\n"
        "quiet = dict(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)\n"
        "def bundles(group):\n"
        "    return list(ray.util.placement_group_table(group)['bundles'].values())\n"
        "out = None\n"
    )
    tail = "\nprint('\\n' + json.dumps(out))\nray.shutdown()\n"
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    done = programs.run(
        [sys.executable, "-c", head + code + tail],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "STARE_DEVICE": "cuda", "RAY_DEDUP_LOGS": "0"} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_gpus_named_by_uuid_reach_engines_as_ray_names_them(tmp_path):
    """Also: the memory that the driver reports, and one group of a run's ranks and own engines."""
    code = """
ray.init(address="local", num_cpus=4, num_gpus=2, **quiet)
config = configuration(trainer={"world_size": 1}, inference={"engines": 1})
places = placement.plan(config)
shared = places.engines[0].environment["CUDA_VISIBLE_DEVICES"], places.gpu_bytes
places.release()
places = placement.plan(configuration(trainer={"world_size": 1}, inference={"engines": 1, "placement": "separate"}))
out = [*shared, bundles(places.groups[0])]
"""
    name, memory, bundles = run(tmp_path, code, CUDA_VISIBLE_DEVICES="GPU-aa,GPU-bb")
    assert name in ("GPU-aa", "GPU-bb")
    assert memory == 81559 * 2**20
    assert bundles == [{"GPU": 1.0, "CPU": 1.0}, {"GPU": 1.0, "CPU": 1.0}]


def test_ranks_that_split_layers_share_a_node(tmp_path):
    code = """
nodes = ray.cluster_utils.Cluster()
for gpus in (3, 1):
    nodes.add_node(num_cpus=4, num_gpus=gpus, include_dashboard=False)
ray.init(address=nodes.address, **{k: v for k, v in quiet.items() if k != "include_dashboard"})
out = []
for tp, engines in ((2, 1), (1, 2)):
    config = configuration(
        trainer={"world_size": 4, "tensor_parallel": tp}, inference={"engines": engines, "tensor_parallel": 2}
    )
    try:
        placement.plan(config)
    except UserError as e:
        out.append(str(e))
    held = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    out.append(len(held))
ray.shutdown(); nodes.shutdown()
"""
    trainer, held, engine, _ = run(tmp_path, code)
    assert trainer.startswith("trainer.tensor_parallel = 2: ranks that split layers, ")
    assert "would span nodes, of which the run gets" in trainer
    assert held == 0
    assert engine.startswith("inference.tensor_parallel = 2: the GPUs of a colocated engine, ")


LOST = """
nodes = ray.cluster_utils.Cluster()
def add(gpus, **resources):
    return nodes.add_node(num_cpus=8, num_gpus=gpus, resources=resources, include_dashboard=False)
add(0)  # the driver's, which lives
first, second = add(2, first=1), add(2, second=1)
ray.init(address=nodes.address, **{k: v for k, v in quiet.items() if k != "include_dashboard"})
config = configuration(
    trainer={"world_size": 4, "tensor_parallel": 2}, inference={"engines": 2, "tensor_parallel": 2}
)
places = placement.plan(config)
def seen(places):
    found = [(b.index, b.node, b.gpu) for b in places.found]
    return found, [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in places.engines]
before = seen(places)
assert places.renewed() is places
"""


def test_after_a_node_is_lost_places_are_those_of_the_nodes_that_there_are(tmp_path):
    """The new node has three GPUs, of which another's task holds the first: an engine of a rank there must see others
    than its number says."""
    code = (
        LOST
        + """
third = add(3, third=1)
ray.get(ray.util.placement_group([{"GPU": 1, "third": 1}]).ready())
nodes.remove_node(second)
places = places.renewed()
after = seen(places)
@ray.remote(num_gpus=1, num_cpus=0)
def gpu():
    return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])
strategies = [slot.options["scheduling_strategy"] for slot in places.trainers]
ranks = ray.get([gpu.options(scheduling_strategy=strategy).remote() for strategy in strategies])
out = [before, after, ranks]
"""
    )
    (before, _), (after, engines), ranks = run(tmp_path, code)
    stayed = [place for place, old in enumerate(before) if old in after]
    assert len(stayed) == 2
    assert [after[place] for place in stayed] == [before[place] for place in stayed]
    moved = [after[place] for place in range(4) if place not in stayed]
    assert [gpu for _, _, gpu in moved] == ["1", "2"]
    assert len({node for _, node, _ in moved}) == 1
    assert [gpu for _, _, gpu in after] == ranks
    assert engines == [",".join(ranks[:2]), ",".join(ranks[2:])]


@pytest.mark.runs
def test_places_that_would_split_what_splits_layers_end_the_run(tmp_path):
    code = (
        LOST
        + """
from stare_megatron.errors import RanksLostError
add(1), add(1)
nodes.remove_node(second)
try:
    places.renewed()
except RanksLostError as e:
    out = str(e)
"""
    )
    said = run(tmp_path, code)
    assert said.startswith(
        "a node is lost, and what was found for it does not do: trainer.tensor_parallel = 2: ranks that split layers, "
    )


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.runs), "cuda"])
def test_a_cluster_too_small_or_taken_is_told_at_once_and_nothing_is_held(tmp_path, device):
    code = """
import time
gpus = 4 if device.current() is device.Device.CUDA else 0
ray.init(address="local", num_cpus=4, num_gpus=gpus, **quiet)
def told(ranks):
    began = time.monotonic()
    try:
        return placement.plan(configuration(
            trainer={"world_size": ranks}, inference={"engines": 2, "placement": "separate"})) and ""
    except UserError as e:
        return str(e), time.monotonic() - began
out = [told(3)]
first = placement.plan(configuration(
    run={"dir": "/runs", "name": "first"}, inference={"engines": 2, "placement": "separate"}))
out.append(told(2))
first.release()
out.append(told(2))
"""
    small, taken, fits = run(tmp_path, code, STARE_DEVICE=device)
    kind = "GPUs" if device == "cuda" else "CPUs"
    assert f"the run needs 5 {kind}" in small[0]
    assert f"the cluster has 4 {kind}, 4 free (" in small[0]
    assert small[1] < 60  # and not after the minutes that Ray would wait for a group
    assert f"the run needs 4 {kind}" in taken[0]
    assert f"the cluster has 4 {kind}, 1 free (" in taken[0]
    assert f"1 free; /runs/first has 3 {kind}); end what holds them" in taken[0]
    assert taken[1] < 120
    assert fits == ""


@pytest.mark.runs
def test_what_runs_code_has_room_of_its_own_on_nodes_that_may(tmp_path):
    """Beside the run's, or nothing is held; without a wish for CPUs or a resource it may be anywhere."""
    code = """
ray.init(address="local", num_cpus=4, resources={"code": 1}, **quiet)
def told(**table):
    config = configuration(
        trainer={"world_size": 1}, inference={"engines": 1}, sandbox={"actors": 2, **table},
        env={"name": "tool_use", "parser": "retool"}, cluster={"address": "auto"},
    )
    try:
        places = placement.plan(config)
    except UserError as e:
        held = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        return [str(e), len(held)]
    found = [bundles(group) for group in places.groups]
    options = [{**o, "scheduling_strategy": str(o["scheduling_strategy"])} for o in places.sandboxes]
    places.release()
    return [found, options[1]["num_cpus"], options[1]["scheduling_strategy"] == "SPREAD"]
out = [told(node_resource="code"), told(actor_cpus=0), told(node_resource="gone"), told(actor_cpus=2)]
"""
    marked, anywhere, gone, small = run(tmp_path, code, STARE_DEVICE="cpu")
    assert marked == [[[{"CPU": 1.0}] * 2, [{"CPU": 1.0, "code": 0.001}] * 2], 1.0, False]
    assert anywhere == [[[{"CPU": 1.0}] * 2], 0.0, True]
    assert "sandbox.node_resource = 'gone': no node has it" in gone[0]
    assert "the run needs 4 CPUs (sandbox.actors x sandbox.actor_cpus" in small[0]
    assert gone[1] == small[1] == 0


def test_an_engine_of_two_workers_starts_them_itself_in_a_placement_group(tmp_path):
    """vLLM would choose Ray, whose workers ask the group for GPUs that the trainer's ranks hold."""
    from tests.e2e.tiny_qwen2 import make_model, save

    save(make_model(tied=True, seed=0), tmp_path / "model")
    code = f"""
ray.init(address="local", num_cpus=4, num_gpus=2, **quiet)
inference = {{"engines": 1, "tensor_parallel": 2}}
places = placement.plan(configuration(trainer={{"world_size": 2}}, inference=inference))

@ray.remote
def executors():
    from pathlib import Path
    from stare_megatron.config import InferenceConfig
    from stare_megatron.inference.engine import Engine
    from vllm.engine.arg_utils import AsyncEngineArgs
    chosen = []
    for d in (device.Device.CUDA, device.Device.CPU):
        device.current = lambda d=d: d
        engine = Engine("e", Path({str(tmp_path / "model")!r}), "float32", InferenceConfig(**inference), 64, 0, "gloo")
        args = AsyncEngineArgs(**engine._args | {{"enable_sleep_mode": False}})  # which asks a GPU
        group = ray.util.get_current_placement_group() is not None
        chosen.append((group, args.create_engine_config().parallel_config.distributed_executor_backend))
    return chosen

slot = places.engines[0]
environment = {{k: v for k, v in slot.environment.items() if k != "CUDA_VISIBLE_DEVICES"}}
out = ray.get(executors.options(**slot.options, runtime_env={{"env_vars": environment}}).remote())
"""
    assert run(tmp_path, code) == [[True, "mp"], [True, "mp"]]
