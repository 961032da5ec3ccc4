"""The real loop over several machines: what it computes, what it needs of them, and how it ends when one fails."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stare_megatron.metrics import jsonl
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings
from tests.cluster.machines import Machine, machines, why_not
from tests.cluster.runs import SMALL, STEPS, command, learned, steps, wait_for_step

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800), pytest.mark.skipif(bool(why_not()), reason=why_not())]

SPLIT = {"trainer.tensor_parallel": 2, "trainer.pipeline_parallel": 2, "trainer.world_size": 4, "inference.engines": 2}
TOOLS = SMALL | {
    "run.steps": 3,
    "eval.benchmarks": "[]",
    "sandbox.actors": 2,
    "sandbox.actor_cpus": 0.5,
    "sandbox.node_resource": "code",
    "sandbox.require": "limits",
}


@pytest.fixture(scope="module")
def pair(shared: Path) -> Iterator[list[Machine]]:
    """Two machines with a cluster of four CPUs each."""
    (shared / "pair").mkdir()
    with machines(2, shared / "pair") as made:
        for machine in made:
            machine.ray(4)
        yield made


def test_two_machines_compute_what_one_does(shared: Path, pair: list[Machine]) -> None:
    """TP2 x PP2 and two engines, spread over both: metrics and samples of the run on one machine, bit for bit; and that
    one goes on from their checkpoint."""
    spread, alone = shared / "spread", shared / "alone"
    code, said = pair[0].run(command(shared, spread, **SPLIT))
    assert code == 0, said[-3000:]
    code, said = pair[1].run(command(shared, alone, **SPLIT | {"cluster.address": "local"}))
    assert code == 0, said[-3000:]
    assert learned(spread / "demo") == learned(alone / "demo")
    for number in range(1, STEPS + 1):
        mine, theirs = ((f / f"demo/samples/step_{number:06d}.txt").read_text() for f in (spread, alone))
        assert mine == theirs

    goes_on = {"run.steps": STEPS + 1, "run.resume": "auto", "cluster.address": "local"}
    code, said = pair[1].run(command(shared, spread, **SPLIT | goes_on))
    assert code == 0, said[-3000:]
    assert steps(spread / "demo") == list(range(1, STEPS + 2))


def test_a_cluster_that_is_too_small(shared: Path, pair: list[Machine]) -> None:
    more = SPLIT | {"trainer.world_size": 8, "inference.engines": 8}
    code, said = pair[0].run(command(shared, shared / "small", **more))
    assert code == 2
    assert "16 CPUs" in said
    assert not (shared / "small/demo").exists()


def test_sigterm_saves(shared: Path, pair: list[Machine]) -> None:
    run = shared / "stopped"
    process = pair[0].start(command(shared, run, **SMALL | {"run.steps": 50}))
    wait_for_step(run / "demo", 2)
    pair[0].run(["pkill", "-TERM", "-f", "stare_megatron train"])
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 130, said[-3000:]
    saved = (run / "demo/checkpoints/latest").read_text().strip()
    assert saved == f"step_{steps(run / 'demo')[-1]:06d}"


def test_a_folder_that_is_not_shared(shared: Path, pair: list[Machine]) -> None:
    """Refused before a rank is started, by the machine that does not see it."""
    runs = shared / "private"
    runs.mkdir()
    pair[1].hide(runs)
    code, said = pair[0].run(command(shared, runs, **SMALL))
    assert code == 2, said[-3000:]
    assert "10.77.0.2" in said
    assert str(runs) in said


@pytest.mark.slow
def test_checkpoints_on_the_machines_own_disks(shared: Path, pair: list[Machine]) -> None:
    """Killed, the run goes on from what both have on their disks; without that of one from the last durable one. Both
    compute the same."""
    runs, disk = shared / "disks", Path("/tmp/stare")
    keys = {"checkpoint.local": disk, "checkpoint.durable_every": 2, "checkpoint.asynchronous": "false"}
    keys |= {"trainer.tensor_parallel": 2, "trainer.world_size": 4, "inference.engines": 2}
    process = pair[0].start(command(shared, runs, **keys | {"run.steps": 50}))
    wait_for_step(runs / "demo", 6)
    latest, deadline = runs / "demo/checkpoints/local/latest", time.monotonic() + 100
    while latest.read_text() != "step_000006\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pair[0].run(["pkill", "-KILL", "-f", "stare_megatron train"])
    process.communicate(timeout=120)
    assert (runs / "demo/checkpoints/step_000004/trainer").is_dir()
    seen: dict[int, set[str]] = {}
    for number, machine in enumerate(pair):
        _, files = machine.run(["find", disk, "-path", "*step_000006*", "-name", "*.distcp"])
        seen[number] = {Path(line).name.split("_")[2] for line in files.split()}
    assert seen[0] in ({"0", "1"}, {"2", "3"})
    assert seen[1] in ({"0", "1"}, {"2", "3"})
    assert seen[0] != seen[1]

    goes_on = keys | {"run.steps": 8, "run.resume": "auto"}
    elsewhere = shared / "elsewhere"
    shutil.copytree(runs, elsewhere, symlinks=True)
    pair[1].run(["mv", disk, "/tmp/away"])
    code, said = pair[0].run(command(shared, elsewhere, **goes_on))
    assert code == 0, said[-3000:]
    assert f"going on from {elsewhere}/demo/checkpoints/step_000004, since a newer one" in said
    assert "on n2 (10.77.0.2)" in said
    pair[1].run(["rm", "-r", disk])
    pair[1].run(["mv", "/tmp/away", disk])
    code, said = pair[0].run(command(shared, runs, **goes_on))
    assert code == 0, said[-3000:]
    assert f"going on from {runs}/demo/checkpoints/local/step_000006, which every node has whole" in said
    assert learned(runs / "demo") == learned(elsewhere / "demo")
    for machine in pair:
        assert machine.run(["find", disk, "-type", "f"]) == (0, "")


def test_a_local_folder_that_is_shared(shared: Path, pair: list[Machine]) -> None:
    code, said = pair[0].run(command(shared, shared / "same", **SMALL | {"checkpoint.local": shared / "disk"}))
    assert code == 2, said[-3000:]
    assert f"checkpoint.local = '{shared / 'disk'}' is the same folder as on n2 (10.77.0.2)" in said
    assert list((shared / "disk").iterdir()) == []


@pytest.mark.slow
def test_two_runs_on_one_cluster(shared: Path, pair: list[Machine]) -> None:
    """Begun at once, both fit, and compute what one alone would; a third is refused while they are, told who has what,
    and disturbs neither."""
    names, last = ["first", "second"], 20
    keys = SMALL | {"run.steps": last}
    both = [pair[n].start(command(shared, shared / "two", **keys | {"run.name": name})) for n, name in enumerate(names)]
    deadline = time.monotonic() + 300
    while not all(list((shared / "two" / name / "logs").glob("trainer*.log")) for name in names):
        assert time.monotonic() < deadline, "no rank was started within 300 s"
        time.sleep(0.2)
    code, refused = pair[0].run(command(shared, shared / "third", **SMALL))
    assert code == 2, refused[-3000:]
    assert "the cluster has 8 CPUs, 0 free (n1 (10.77.0.1): 4, 0 free; n2 (10.77.0.2): 4, 0 free" in refused
    for name in names:
        assert f"{shared}/two/{name} has 4 CPUs" in refused
    assert not (shared / "third/demo").exists()
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)[-3000:]
    assert steps(shared / "two/first") == list(range(1, last + 1))
    assert learned(shared / "two/first") == learned(shared / "two/second")
    for name in names:
        firsts = [file.read_text().partition("\n")[0] for file in (shared / "two" / name / "logs").glob("*.log")]
        assert len(firsts) == 4, firsts


@pytest.mark.slow
def test_code_runs_on_a_machine_of_its_own(shared: Path) -> None:
    """The two actors that run code take room on the third machine, the only one with the resource that they ask for."""
    (shared / "three").mkdir()
    make(default_settings("tool_arithmetic", layers=2, seed=3), shared / "tools", 256, 8)
    run = shared / "three-runs"
    where = {"model.path": shared / "tools/model", "data.train": json.dumps([str(shared / "tools/train.jsonl")])}
    with machines(3, shared / "three") as made:
        for machine in made[:2]:
            machine.ray(2)
        without = command(shared, run, "tool_use_cpu", **TOOLS, **where)
        code, said = made[0].run(without, timeout=120)
        assert code == 2, said[-3000:]
        assert "sandbox.node_resource = 'code': no node has it; start Ray on those that may run code with" in said
        made[2].ray(4, '--resources={"code": 1}')
        process = made[0].start(without)
        wait_for_step(run / "demo", 1)
        there = [machine.run(["pgrep", "-fc", "ray::SandboxActor"])[1].strip() for machine in made]
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    assert there == ["0", "0", "2"]
    last = jsonl.read(run / "demo/metrics.jsonl")[-1]
    assert last["tools/calls"] > 0
    assert last["response/ungraded"] == 0


@pytest.mark.slow
def test_machines_named_as_debian_names_them(shared: Path) -> None:
    """A host name that resolves to 127.0.1.1 is no address for others."""
    (shared / "debian").mkdir()
    with machines(2, shared / "debian", debian=True) as made:
        for machine in made:
            machine.ray(2)
        code, said = made[0].run(command(shared, shared / "debian-runs", **SMALL | {"run.steps": 1}))
        assert code == 0, said[-3000:]


@pytest.mark.slow
def test_a_machine_that_is_switched_off(shared: Path) -> None:
    """Its rank finds no other room: the run ends, names the machine, and what is saved."""
    (shared / "off").mkdir()
    run = shared / "off-runs"
    with machines(2, shared / "off") as made:
        for machine in made:
            machine.ray(2)
        process = made[0].start(command(shared, run, **SMALL | {"run.steps": 50}))
        wait_for_step(run / "demo", 3)
        made[1].switch_off()
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 75, said[-3000:]
        assert "10.77.0.2" in said
        assert "step_000002" in said


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [8, 20, 60])
def test_a_cable_that_is_pulled_for_a_while(seconds: int, shared: Path) -> None:
    """A lost link is not taken for a process that died: the run waits and learns every step once, or, where Ray gives
    the machine up, ends with what it has saved and names it."""
    (shared / f"cut{seconds}").mkdir()
    runs, last = shared / f"cut{seconds}-runs", 12
    with machines(2, shared / f"cut{seconds}") as made:
        for machine in made:
            machine.ray(2)
        process = made[0].start(command(shared, runs, **SMALL | {"run.steps": last}))
        wait_for_step(runs / "demo", 3)
        made[1].unplug()
        time.sleep(seconds)
        made[1].plug()
        said, _ = process.communicate(timeout=300)
    assert "its process died" not in said, said[-3000:]
    if process.returncode:
        assert process.returncode == 75, said[-3000:]
        assert "10.77.0.2" in said
        assert "checkpoints/step_" in said
    else:
        assert steps(runs / "demo") == list(range(1, last + 1))


@pytest.mark.slow
def test_another_machine_goes_on_with_the_run_of_one_that_is_gone(shared: Path) -> None:
    """Driver, ranks and engines were on it; the head lives. The whole equals a run that nothing interrupted."""
    (shared / "gone").mkdir()
    runs, alone = shared / "gone-runs", shared / "gone-alone"
    with machines(3, shared / "gone") as made:
        made[0].ray(0)
        made[1].ray(4)
        process = made[1].start(command(shared, runs, **SMALL | {"run.steps": 50}))
        wait_for_step(runs / "demo", 3)
        made[1].switch_off()
        process.communicate(timeout=60)
        done = steps(runs / "demo")[-1]
        made[2].ray(4)
        last = {"run.steps": done + 2}
        code, said = made[2].run(command(shared, runs, **SMALL | last | {"run.resume": "auto"}))
        assert code == 0, said[-3000:]
        assert f"checking {runs}/demo/checkpoints/step_" in said
        code, said = made[2].run(command(shared, alone, **SMALL | last))
        assert code == 0, said[-3000:]
    assert steps(runs / "demo") == list(range(1, done + 3))
    assert learned(runs / "demo") == learned(alone / "demo")


@pytest.mark.slow
def test_a_run_goes_on_where_there_is_room(shared: Path) -> None:
    """What a machine had that is switched off is started again on the two that are left."""
    (shared / "room").mkdir()
    run, last = shared / "room-runs", 9
    with machines(3, shared / "room") as made:
        for machine in made:
            machine.ray(3)
        process = made[0].start(command(shared, run, **SMALL | {"run.steps": last}))
        wait_for_step(run / "demo", 3)
        made[2].switch_off()
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    assert steps(run / "demo") == list(range(1, last + 1))
    assert "10.77.0.3" in said  # something of it was lost, and named
