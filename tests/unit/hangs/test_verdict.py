"""Who is at fault, from what four gloo ranks (TP 2 x DP 2) recorded when they hung, and from what else is seen."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from stare_megatron.hangs.verdict import group_called, several, verdict
from stare_megatron.hangs.witness import Witness
from stare_megatron.host.evidence import Flight, Frame, GroupMembers, Operation, ProcessState, ProcessTree
from stare_megatron.host.stacks import read_flight
from tests.contracts.source import ROOT

FLIGHTS = ROOT / "tests/data/flights"


def recorded(case: str) -> list[Witness]:
    """torch 2.13's records of a hang, each rank's last four operations."""
    found = json.loads((FLIGHTS / f"gloo_{case}.json").read_text())
    return [rank(int(number), flight_of(int(number), record)) for number, record in found.items()]


def flight_of(number: int, record: dict[str, Any]) -> Flight:
    groups = [GroupMembers(name, description, tuple(ranks)) for name, description, ranks in record["groups"]]
    return read_flight(record["recorded"], number, groups)


def rank(number: int, flight: Flight | None, **more: Any) -> Witness:
    return Witness(f"trainer rank {number}", number, answers=flight is not None, flight=flight, **more)


def tree(*statuses: str) -> ProcessTree:
    """Processes 100, 101, ..., the first over the others."""
    return ProcessTree(
        tuple(
            ProcessState(
                pid=100 + n,
                parent=100 if n else 1,
                name="VLLM::EngineCore" if n else "ray::Actor",
                status=status,
                waits_in="nfs_wait" if status == "disk-sleep" else "",
                kernel="",
                threads=1,
                bytes=1 << 20,
                stacks="",
            )
            for n, status in enumerate(statuses)
        ),
        log="",
    )


def test_a_rank_that_never_entered_a_collective_is_at_fault_for_those_that_wait_for_the_waiting():
    """Rank 3 sleeps: rank 2 waits for it in the tensor-parallel group, 0 and 1 wait in the data-parallel ones."""
    found = verdict(recorded("sleeps"))
    assert found.culprits == ("trainer rank 3",)
    assert found.line.startswith("trainer rank 3 never entered all_reduce #3 of the ")
    assert found.line.endswith("; the others wait")


def test_where_the_culprit_is_is_said():
    witnesses = recorded("sleeps")
    frames = (Frame("sleep", "/usr/lib/python3.11/time.py", 1), Frame("oversleep", "own.py", 31))
    witnesses[3] = dataclasses.replace(witnesses[3], activity="update for 130 s", frames=frames)
    assert (
        "; it has been at update for 130 s, is in sleep (/usr/lib/python3.11/time.py:1) under oversleep (own.py:31)"
        in (verdict(witnesses).line)
    )


def test_a_stopped_rank_says_nothing_and_is_at_fault():
    witnesses = recorded("sleeps")
    witnesses[3] = rank(3, None, tree=tree("stopped"))
    found = verdict(witnesses)
    assert found.culprits == ("trainer rank 3",)
    assert found.line.startswith("trainer rank 3 never entered all_reduce #3 of the ")
    assert found.line.endswith("; it is stopped (process 100)")


def test_ranks_that_entered_different_collectives_are_told_apart():
    found = verdict(recorded("kinds"))
    assert found.line == (
        "trainer rank 1 entered all_gather where the others entered all_reduce, #3 of the tensor-parallel group"
    )
    assert found.culprits == ("trainer rank 1",)


def test_ranks_that_entered_one_collective_with_different_sizes_are_told_apart():
    group = GroupMembers("1", "DATA_PARALLEL_GROUP", (0, 1, 2))
    sizes = [((6,),), ((6,),), ((7,),)]
    witnesses = [
        rank(r, Flight(r, (group,), (Operation("1", 9, "all_reduce", s, False),))) for r, s in enumerate(sizes)
    ]
    assert verdict(witnesses).line == (
        "trainer rank 2 entered all_reduce of [7] where the others entered all_reduce of [6], #9 of the data-parallel "
        "group"
    )
    split = [dataclasses.replace(w, flight=_as("all_to_all", w.flight)) for w in witnesses]
    assert "does not end" in verdict(split).line  # parts of an all-to-all may differ


def _as(kind: str, flight: Flight | None) -> Flight:
    assert flight
    return dataclasses.replace(flight, operations=tuple(dataclasses.replace(o, kind=kind) for o in flight.operations))


def test_a_circle_of_waits_names_all_in_it():
    """Ranks 0 and 3 went into the data-parallel collective first, 1 and 2 into the tensor-parallel one."""
    found = verdict(recorded("circle"))
    assert set(found.culprits) == {f"trainer rank {n}" for n in range(4)}
    assert found.line.startswith("ranks wait for each other: trainer rank 0 in all_reduce #3 of the data-parallel-")
    assert "for trainer rank 2; trainer rank 1 in all_reduce #3 of the tensor-parallel group for trainer rank 0" in (
        found.line
    )


def test_a_collective_that_all_entered_accuses_nobody():
    group = GroupMembers("1", "EXPERT_MODEL_PARALLEL_GROUP", (0, 1))
    done, left = (Operation("1", 4, "all_reduce", ((6,),), finished) for finished in (True, False))
    found = verdict([rank(0, Flight(0, (group,), (done,))), rank(1, Flight(1, (group,), (left,)))])
    assert found.culprits == ()
    assert found.line == (
        "all ranks entered all_reduce #4 of the expert-parallel group, and it does not end on trainer rank 1: the "
        "network or a device"
    )


def test_a_stage_that_sends_nothing_is_at_fault():
    """gloo's recorder has no messages: a rank that waits for one is known by its stack."""
    group = GroupMembers("5", "PIPELINE_MODEL_PARALLEL_GROUP", (0, 1, 2))
    waiting = (Frame("wait", "torch/distributed.py", 1), Frame("_communicate", "x/p2p_communication.py", 2))
    witnesses = [rank(r, Flight(r, (group,), ()), frames=() if r == 1 else waiting) for r in range(3)]
    found = verdict(witnesses)
    assert found.culprits == ("trainer rank 1",)
    assert found.line == "trainer rank 1 sent no message; the others wait for it in the pipeline"


def test_a_message_of_nccl_leads_to_who_does_not_answer_it():
    groups = (GroupMembers("5", "PIPELINE_MODEL_PARALLEL_GROUP", (4, 6)),)
    entry = {
        "process_group": ("5", "PIPELINE_MODEL_PARALLEL_GROUP"),
        "p2p_seq_id": 3,
        "collective_seq_id": 7,
        "profiling_name": "nccl:recv 0<-1",
        "input_sizes": [[2, 2]],
        "state": "started",
        "retired": False,
        "is_p2p": True,
    }
    waits = read_flight({"entries": [entry]}, 4, groups)
    assert waits.operations == (Operation("5", 3, "recv", ((2, 2),), False, peer=6),)
    found = verdict([rank(4, waits), rank(6, Flight(6, groups, ()))])
    assert found.culprits == ("trainer rank 6",)


def test_a_stopped_child_of_an_engine_is_named():
    engines = [
        Witness("engine 0", -1, answers=True, activity="sample p1 for 130 s", tree=tree("sleeping", "stopped")),
        Witness("engine 1", -1, answers=True, activity="sample p2 for 130 s", tree=tree("sleeping", "sleeping")),
    ]
    found = verdict(engines)
    assert found.culprits == ("engine 0",)
    assert found.line == "engine 0 waits: its process 101, VLLM::EngineCore, is stopped"


def test_who_neither_answers_nor_can_be_looked_at_is_named():
    others = [w for w in recorded("sleeps") if w.rank < 3]
    lost = Witness("engine 0 on b (10.0.0.2)", -1, answers=False)
    assert verdict([lost]).line == "engine 0 on b (10.0.0.2) does not answer, nor does its machine"
    found = verdict([*others, rank(3, None)])
    assert found.line.endswith("; it does not answer, nor does its machine")


def test_where_nobody_waits_it_is_said_what_each_is_at():
    frame = Frame("loss", "own.py", 3)
    busy = [
        Witness(f"trainer rank {n}", n, answers=True, activity="update for 9 s", frames=(frame,), tree=tree("running"))
        for n in range(2)
    ]
    assert verdict(busy).line == (
        "trainer rank 0 and trainer rank 1: has been at update for 9 s, is in loss (own.py:3)"
    )
    held = Witness("engine 0", -1, answers=False, tree=tree("disk-sleep"))
    found = verdict([*busy, held])
    assert found.culprits == ("engine 0",)
    assert found.line == "engine 0: sleeps in the kernel in nfs_wait"


def test_groups_are_called_as_people_do():
    called = {d: group_called(GroupMembers("9", d, ())) for d in ("default_pg", "", "EMBEDDING_GROUP")}
    assert called == {"default_pg": "the group of all ranks", "": "group 9", "EMBEDDING_GROUP": "the embedding group"}
    assert group_called(GroupMembers("9", "DATA_PARALLEL_GROUP_WITH_CP", ())) == "the data-parallel-with-cp group"


def test_many_names_are_few_words():
    names = [f"rank {n}" for n in range(9)]
    assert [several(names[:n]) for n in (1, 2, 4, 5)] == [
        "rank 0",
        "rank 0 and rank 1",
        "rank 0, rank 1, rank 2 and rank 3",
        "rank 0, rank 1, rank 2 and 2 more",
    ]


def test_of_a_long_record_the_unfinished_and_the_newest_of_each_group_stay():
    entries = [
        {
            "process_group": ("1" if n else "2", "x"),
            "collective_seq_id": n + 1,
            "profiling_name": "gloo:all_reduce",
            "input_sizes": [[n]],
            "state": "scheduled",
            "retired": n != 7,
            "is_p2p": False,
        }
        for n in range(900)
    ]
    flight = read_flight({"entries": entries}, 0, ())
    assert [o.number for o in flight.operations] == [1, 8, *range(701, 901)]
