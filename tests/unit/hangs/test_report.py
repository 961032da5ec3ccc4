"""The folder of a hang."""

from __future__ import annotations

from pathlib import Path

from stare_megatron.hangs import report
from stare_megatron.hangs.verdict import Verdict
from stare_megatron.hangs.witness import Witness
from stare_megatron.host.evidence import (
    Flight,
    Frame,
    GroupMembers,
    MachineState,
    Operation,
    ProcessState,
    ProcessTree,
    ThreadStack,
)
from tests.flights import read_flight_json

FLIGHT = Flight(
    1,
    (GroupMembers("2", "TENSOR_MODEL_PARALLEL_GROUP", (0, 1)),),
    (Operation("2", 4, "all_reduce", ((8, 2),), False), Operation("2", 1, "send", ((8,),), True, peer=0)),
)
CHILD = ProcessState(
    pid=12,
    parent=11,
    name="VLLM::EngineCore",
    status="sleeping",
    waits_in="futex_do_wait",
    kernel="[<0>] futex_do_wait\n[<0>] do_futex",
    threads=3,
    bytes=5 << 20,
    stacks="Thread 0x1 (most recent call first):",
)


def hang() -> report.Hang:
    threads = (ThreadStack(1, "MainThread", (Frame("wait", "a.py", 3), Frame("main", "b.py", 9))),)
    silent = Witness("engine 0 on b (10.0.0.2)", -1, answers=False, tree=ProcessTree((CHILD,), "last line"))
    rank = Witness(
        "trainer rank 1", 1, answers=True, activity="update for 9 s", threads=threads, flight=FLIGHT, tree=None
    )
    machine = MachineState("b", {}, "b: memory 1.0 of 2.0 GiB used")
    return report.Hang("trainer rank 1: no answer", Verdict("it sleeps", ()), [silent, rank], [machine], threads)


def test_everything_is_written_under_the_names_that_users_know(tmp_path: Path):
    folder = tmp_path / "here"
    report.write(folder, hang())
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert texts["verdict.txt"] == "trainer rank 1: no answer\nit sleeps\n"
    assert texts["processes.txt"] == (
        "engine 0 on b (10.0.0.2): no answer\n"
        "  12 (under 11) VLLM::EngineCore: sleeping, 3 threads, 5 MiB, sleeps in futex_do_wait\n"
        "      [<0>] futex_do_wait\n"
        "      [<0>] do_futex\n"
        "\n"
        "trainer rank 1: update for 9 s\n"
    )
    stack = "MainThread\n  wait (a.py:3)\n  main (b.py:9)\n"
    assert texts["stacks/driver.txt"] == stack
    assert texts["stacks/trainer_rank_1.txt"] == stack
    assert texts["stacks/engine_0.12.txt"].endswith("\n\nThread 0x1 (most recent call first):")
    assert texts["logs/engine_0.txt"] == "last line"
    assert texts["machines.txt"] == "b: memory 1.0 of 2.0 GiB used\n"
    assert read_flight_json(texts["flight/trainer_rank_1.json"]) == FLIGHT
    assert len(texts) == 8


def test_a_second_hang_of_a_phase_has_a_folder_of_its_own(tmp_path: Path):
    names = []
    for _ in range(3):
        folder = report.place(tmp_path, 12, "between phases")
        folder.mkdir(parents=True)
        names.append(str(folder.relative_to(tmp_path)))
    assert names == [f"forensics/12-between-phases{suffix}" for suffix in ("", "-2", "-3")]
