"""Each fault, injected into what is known of a healthy cluster, is found by its own check, and nothing else is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from stare_megatron import doctor
from stare_megatron.cluster.nodes import Blocked
from stare_megatron.doctor import checks, command, network, survey
from stare_megatron.doctor.facts import ClusterFacts, Gpu, Resources
from stare_megatron.errors import UserError
from stare_megatron.host.packages import MISSING
from tests.configs import configuration, small_model
from tests.unit.doctor.clusters import (
    GIB,
    H100,
    MODEL,
    REFERENCE,
    gpu_node,
    node,
    on_cpu,
    on_gpus,
    one_machine,
    two_gpu_nodes,
)

Change = Callable[[ClusterFacts], ClusterFacts]


def second(**changes: Any) -> Change:
    """Changes of the second node."""
    return lambda f: dataclasses.replace(f, nodes=(f.nodes[0], dataclasses.replace(f.nodes[1], **changes)))


def every(**changes: Any) -> Change:
    """Changes of all nodes and of the driver."""

    def change(f: ClusterFacts) -> ClusterFacts:
        nodes = tuple(dataclasses.replace(n, **changes) for n in f.nodes)
        return dataclasses.replace(f, nodes=nodes, driver=dataclasses.replace(f.driver, **changes))

    return change


def driver(**changes: Any) -> Change:
    return lambda f: dataclasses.replace(f, driver=dataclasses.replace(f.driver, **changes))


def without_reference(f: ClusterFacts) -> ClusterFacts:
    """The second node lacks the reference policy, which the driver has."""
    seen = f.driver.paths | {REFERENCE: "def"}
    return second(paths=seen | {REFERENCE: MISSING})(driver(paths=seen)(f))


def whole(**changes: Any) -> Change:
    return lambda f: dataclasses.replace(f, **changes)


def other(**versions: str) -> dict[str, str]:
    return gpu_node(2).versions | versions


BUSY = (H100, dataclasses.replace(H100, used_bytes=40 * GIB))
REFUSED = "cluster.address = 'auto': Ray does not answer: Unauthenticated: RPC error: InvalidAuthToken"
OLD = "cluster.address = 'auto': Ray does not answer: Version mismatch: The cluster was started with: Ray: 2.59.0"
UNKNOWN = "cluster.address = 'auto': Ray does not answer: Broken pipe"
NONE = "cluster.address = 'auto': Ray does not answer: Could not find any running Ray instance"

# Check, injected fault, words of the problem, words of the cure.
GPU_FAULTS: list[tuple[str, Change, str, str]] = [
    ("no_answer", whole(nodes=(), no_answer="Connection refused", ray_address="h:1"), "h:1", "unset RAY_ADDRESS"),
    ("no_answer", whole(nodes=(), no_answer="timed out", address="10.0.0.9:6379"), "10.0.0.9:6379", "ray start --head"),
    ("refusal", whole(nodes=(), refusal=REFUSED), "InvalidAuthToken", "RAY_AUTH_MODE=token"),
    ("refusal", whole(nodes=(), refusal=OLD), "Ray: 2.59.0", "versions of Python and Ray"),
    ("refusal", whole(nodes=(), refusal=UNKNOWN), "Broken pipe", "`ray status`"),
    ("refusal", whole(nodes=(), refusal=NONE), "any running Ray", "ray start"),
    ("silent", whole(silent={"node3 (10.0.0.3)": "no answer within 180 s"}), "node3 (10.0.0.3)", "take the node out"),
    (
        "silent",
        whole(silent={"node3": "ModuleNotFoundError: No module named 'torch'"}),
        "No module",
        "install",
    ),
    ("versions", second(versions=other(torch="2.11.0")), "torch 2.11.0, the driver's is 2.13.0", "environment there"),
    ("versions", second(versions=other(Python="3.11.9")), "Python 3.11.9", "environment there"),
    ("versions", second(versions=other(vllm=MISSING)), "vllm missing", "start Ray again"),
    ("versions", second(versions=other(stare_megatron="0.1.0 (code ff)")), "(code ff)", "environment there"),
    ("packages", every(versions=other(torch=MISSING)), "torch", "extra `gpu`"),
    ("packages", every(versions=other(vllm=MISSING)), "vllm", "extra `gpu`"),
    ("authentication", second(auth_mode="token", token="aa"), "token on node2", "RAY_AUTH_MODE=token"),
    (
        "authentication",
        lambda f: second(token="bb")(every(auth_mode="token", token="aa")(f)),
        "bb on node2",
        "copy the head's ~/.ray/auth_token",
    ),
    ("loopback", second(address="127.0.0.1", resolved="127.0.0.1"), "cannot reach", "--node-ip-address"),
    ("interface", second(interface=""), "carries 10.0.0.2", "--node-ip-address"),
    ("host_name", second(resolved="127.0.1.1"), "127.0.1.1, not to 10.0.0.2", "GLOO_SOCKET_IFNAME=eth0"),
    ("host_name", second(resolved=""), "nothing", "/etc/hosts"),
    ("gloo_interface", every(environment={"GLOO_SOCKET_IFNAME": "ib0"}), "ib0 names no interface", "lo, eth0"),
    ("nccl_interface", every(environment={"NCCL_SOCKET_IFNAME": "ib,mlx"}), "ib,mlx", "unset it"),
    ("nccl_interface", every(environment={"NCCL_SOCKET_IFNAME": "=eth"}), "=eth", "unset it"),
    ("ports", whole(blocked=(Blocked("a", "b", (21, 9), "timed out"),)), "a cannot connect to its ports 21, 9", "TCP"),
    ("clock", second(clock=-30.0), "30.0 s behind", "NTP"),
    ("environment", second(environment={"NCCL_IB_HCA": "mlx5_0"}), "not set on node1", "one value on every node"),
    ("environment", driver(environment={"NCCL_DEBUG": "INFO"}), "not set on any node", "driver's environment stays"),
    ("driver_device", lambda f: driver(gpus=())(whole(device="cpu")(f)), "16 GPUs", "STARE_DEVICE=cuda"),
    ("gpu_driver", every(gpus=(), gpu_error="Driver/library version mismatch"), "nvidia-smi fails", "driver again"),
    ("cuda_build", every(torch_cuda=""), "built without CUDA", "extra `gpu`"),
    ("cuda_build", every(driver_cuda="12.4"), "serves 12.4", "newer NVIDIA driver"),
    ("ray_gpus", second(gpus=(H100,) * 9), "shows 9 GPUs, and Ray counts 8", "--num-gpus"),
    ("gpu_kinds", second(gpus=(Gpu("NVIDIA H200", 141 * GIB, 0, "Default"),) * 8), "H200 on node2", "one kind"),
    ("gpu_drivers", second(gpu_driver="570.1"), "570.1 on node2", "one NVIDIA driver"),
    ("nvlink", second(nvlink=False), "not joined by NVLink", "fabricmanager"),
    ("gpu_memory", second(gpus=BUSY), "GPU 1: 40 GiB", "nvidia-smi"),
    ("compute_mode", every(gpus=(dataclasses.replace(H100, compute_mode="Exclusive_Process"),)), "Exclusive", "-c DEF"),
    ("transformer_engine", second(transformer_engine="ImportError: undefined symbol"), "undefined", "build_te.sh"),
    (
        "shared_folder",
        second(shared_visible=False, shared_error="No such file"),
        "/work/runs is not seen",
        "file system",
    ),
    ("shared_writable", second(shared_error="Permission denied"), "Permission denied", "Ray's user may write"),
    ("local_folder", second(local_error="Permission denied"), "there (Permission denied)", "make and write on every"),
    ("local_folder", second(local_with=("n3 (10.0.0.3)",)), "the same folder as on n3 (10.0.0.3)", "each node's own"),
    ("shared_writable", driver(shared_error="Read-only file system"), "node1 (10.0.0.1): ", "Ray's user may write"),
    ("paths_missing", second(paths={MODEL: MISSING}), f"node2 (10.0.0.2): {MODEL} is not there", "same path"),
    ("paths_missing", every(paths={MODEL: MISSING}), f"this machine: {MODEL} is not there", "same path"),
    ("paths_missing", without_reference, f"node2 (10.0.0.2): {REFERENCE} is not there", "same path"),
    ("paths_differ", second(paths={MODEL: "def"}), "not what the driver has", "copy the driver's"),
    ("shared_memory", second(shm_bytes=64 * 2**20), "/dev/shm has 0.06 GiB", "--shm-size"),
    ("locked_memory", second(memlock=8 * 2**20), "lock 8 MiB", "ulimit -l unlimited"),
    ("open_files", second(nofile=1024), "1024 files", "ulimit -n 65536"),
    ("temp_disk", second(temp_used=0.97), "97% full", "/tmp/ray"),
    ("free_disk", every(free_bytes=GIB), "1.0 GiB free", "run.min_free_mb"),
    ("orphans", second(orphans=("VLLM::EngineCore (process 7)",)), "process 7", "kill"),
    ("enough", whole(nodes=(gpu_node(1),)), "needs 16 GPUs; the cluster has 8", "add nodes"),
    ("enough", second(ray=Resources(16, 16, 8, 4, 9 * GIB)), "12 of them free", "end what holds them"),
    ("enough", every(ray=Resources(4, 4, 8, 8, 9 * GIB)), "needs 16 CPUs; the cluster has 8", "add nodes"),
]
CPU_FAULTS: list[tuple[str, Change, str, str]] = [
    ("second_ray", whole(ray_address="10.0.0.9:6379"), "10.0.0.9:6379", "cluster.address=auto"),
    ("refusal", whole(nodes=(), refusal="cluster.address = 'local': Ray does not answer: disk"), "disk", "/tmp/ray"),
    ("packages", every(versions=node(1).versions | {"megatron-core": MISSING}), "megatron-core", "extra `cpu`"),
    ("gloo_interface", every(environment={"GLOO_SOCKET_IFNAME": "eth7"}), "eth7", "lo, eth0"),
    ("paths_missing", every(paths={MODEL: MISSING}), f"this machine: {MODEL} is not there", "copy or mount"),
    ("transformer_engine", every(transformer_engine="FileNotFoundError: no .so"), "no .so", "uninstall"),
    ("shared_memory", every(shm_bytes=64 * 2**20), "0.06 GiB, less than 9.00", "remount"),
    ("shared_writable", driver(shared_error="Not a directory"), "/work/runs fails: Not a directory", "run.dir"),
]


def names(row: tuple[str, Change, str, str]) -> str:
    return f"{row[0]}-{row[2]}"


def expect(facts: ClusterFacts, config: Any, check: str, what: str, cure: str) -> None:
    found = checks.find(facts, config)
    assert {p.check for p in found} == {check}, [str(p) for p in found]
    for problem in found:
        assert "\n" not in str(problem)
        assert what in f"{problem.finding.where}: {problem.finding.what}", problem
        assert cure in problem.finding.cure, problem


@pytest.mark.parametrize("row", GPU_FAULTS, ids=names)
def test_a_fault_of_a_gpu_cluster_is_found(row):
    check, change, what, cure = row
    expect(change(two_gpu_nodes()), on_gpus(), check, what, cure)


@pytest.mark.parametrize("row", CPU_FAULTS, ids=names)
def test_a_fault_of_one_machine_is_found(row):
    check, change, what, cure = row
    expect(change(one_machine()), on_cpu(), check, what, cure)


@pytest.mark.parametrize("config", [None, on_cpu()], ids=["machine", "run"])
def test_one_healthy_machine_has_no_problems(config):
    assert checks.find(one_machine(), config) == []


@pytest.mark.parametrize("config", [None, on_gpus()], ids=["cluster", "run"])
def test_two_healthy_gpu_nodes_have_no_problems(config):
    assert checks.find(two_gpu_nodes(), config) == []


def test_a_head_without_gpus_need_not_see_the_model():
    """Nothing runs on it, and the driver elsewhere."""
    head = node(3, paths={MODEL: MISSING}, shared_visible=False, versions=gpu_node(1).versions)
    facts = dataclasses.replace(two_gpu_nodes(), nodes=(*two_gpu_nodes().nodes, head))
    assert checks.find(facts, on_gpus()) == []


def test_builds_of_one_version_go_together():
    """A driver with the packages for CPUs, and GPUs elsewhere; a node for sandboxes has neither."""
    facts = two_gpu_nodes()
    cpu = node(3).versions | {"torch": "2.13.0+cpu"}
    gpu = facts.nodes[0].versions | {"torch": "2.13.0+cu130"}
    sandbox = node(4, versions={"Python": "3.12.1", "ray": "2.60.0", "stare_megatron": cpu["stare_megatron"]})
    nodes = (dataclasses.replace(facts.nodes[0], versions=gpu), facts.nodes[1], sandbox)
    facts = dataclasses.replace(facts, nodes=nodes, driver=dataclasses.replace(facts.driver, versions=cpu))
    assert [p for p in checks.find(facts, on_gpus()) if p.check == "versions"] == []
    wrong = dataclasses.replace(sandbox, versions=sandbox.versions | {"ray": "2.59.0"})
    (problem,) = checks.find(dataclasses.replace(facts, nodes=(*nodes[:2], wrong)), on_gpus(), (network.versions,))
    assert str(problem).startswith("node4 (10.0.0.4): ray 2.59.0, the driver's is 2.60.0; install")


def test_a_part_of_a_nodes_gpus_is_nothing_wrong():
    """Each node may give another part; Ray counts what it was shown."""
    part = gpu_node(
        2, gpus=(H100,) * 4, ray=Resources(16, 16, 4, 4, 0), environment={"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    )
    facts = dataclasses.replace(two_gpu_nodes(), nodes=(gpu_node(1), part))
    assert checks.find(facts, None) == []
    (problem,) = checks.find(second(gpus=(H100,) * 9)(two_gpu_nodes()), None)
    assert not problem.stops


def test_tensor_parallel_groups_must_fit_within_nodes():
    small = tuple(gpu_node(i, gpus=(H100,) * 3, ray=Resources(16, 16, 3, 3, 0)) for i in (1, 2, 3, 4))
    facts = dataclasses.replace(two_gpu_nodes(), nodes=small)
    config = configuration(trainer={"world_size": 8, "tensor_parallel": 4}, inference={"engines": 1})
    expect(facts, config, "tensor_parallel", "trainer.tensor_parallel = 4", "divides the GPUs of a node")


def test_what_ranks_keep_in_host_memory_must_fit_their_node(tmp_path):
    """A billion parameters: optimizer state over two owners on eight GPUs, and all of the state on one CPU."""
    model = small_model(tmp_path / "m", hidden_size=4096, intermediate_size=16384, weights=False)
    large = {"model": {"path": str(model)}, "inference": {"engines": 1}}
    moved = configuration(**large, trainer={"world_size": 8, "tensor_parallel": 4, "offload": ["optimizer"]})
    nodes = tuple(gpu_node(i, memory_bytes=8 * GIB) for i in (1, 2))
    small = dataclasses.replace(two_gpu_nodes(), nodes=nodes)
    expect(small, moved, "host_memory", "8 of the 8 ranks keep", "trainer.offload = ['optimizer']")
    assert checks.find(small, configuration(**large, trainer={"world_size": 8, "tensor_parallel": 4})) == []
    assert checks.find(two_gpu_nodes(), moved) == []
    alone = dataclasses.replace(one_machine(), nodes=(node(1, memory_bytes=8 * GIB),))
    expect(alone, configuration(**large), "host_memory", "1 of the 1 ranks keep", "nodes with more memory")


def test_every_check_has_a_fault():
    injected = {row[0] for row in (*GPU_FAULTS, *CPU_FAULTS)} | {"tensor_parallel", "host_memory"}
    assert injected == {check.__name__ for check in (*checks.FAULTS, *checks.WARNINGS)}
    assert len(injected) >= 30


@pytest.mark.parametrize(
    ("change", "code"),
    [(whole(), 0), (second(clock=9.0), 0), (second(versions=other(ray="2.59.0")), 1)],
    ids=["healthy", "warning", "problem"],
)
def test_the_command_shows_a_table_and_a_line_a_problem(change, code, monkeypatch, capsys):
    facts = change(two_gpu_nodes())
    monkeypatch.setattr(survey, "full", lambda config, cluster: facts)
    assert command.run(["cluster.address=auto"], Console(width=160)) == code
    *shown, last = capsys.readouterr().out.splitlines()
    assert "2.60.0" in shown[0]
    assert [line.split()[0] for line in shown[2:4]] == ["node1", "node2"]
    assert "8 x NVIDIA H100 80GB HBM3 (80 GiB), NVLink" in shown[2]
    problems = checks.find(facts, None)
    assert last == "no problems" if not problems else last.split(maxsplit=1)[1] == str(problems[0])


def test_only_the_address_can_be_set_without_a_file():
    with pytest.raises(UserError, match=r"run\.name=x: without a run's file only cluster\.address="):
        command.run(["run.name=x"], Console())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cluster.address="], "command line: cluster.address = '': must not be empty"),
        (["cluster.address='a\0'"], "must not hold the character NUL"),
        (
            ["cluster.address=nowhere"],
            "command line: cluster.address = 'nowhere': must be `local`, `auto` or HOST:PORT",
        ),
        (["cluster.address=3"], "command line: cluster.address = 3: must be a string, in quotes"),
        ([""], "file = '': must be a path"),
        (["a\0b"], "file = 'a\\x00b': must be a path"),
        (["$NOWHERE_AT_ALL/run.toml"], "the environment variable $NOWHERE_AT_ALL is not defined"),
    ],
)
def test_odd_arguments_are_told_in_one_line(settings, words):
    with pytest.raises(UserError) as e:
        command.run(settings, Console())
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_a_run_stops_at_the_first_problem_and_counts_the_others(monkeypatch):
    facts = second(paths={MODEL: MISSING}, shared_visible=False, clock=99.0)(two_gpu_nodes())
    monkeypatch.setattr(survey, "short", lambda config, folder: facts)
    with pytest.raises(UserError, match=r"^node2 \(10\.0\.0\.2\): .*not seen.*\(1 more problem: `.*stare-megatron"):
        doctor.short(on_gpus(), None)
    monkeypatch.setattr(survey, "short", lambda config, folder: two_gpu_nodes())
    doctor.short(on_gpus(), None)
