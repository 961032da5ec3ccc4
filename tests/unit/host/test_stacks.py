"""What is read of torch's flight recorders: gloo's own, and NCCL's, whose function CPU builds of torch lack."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as recorder  # pyright: ignore[reportAttributeAccessIssue]

from stare_megatron.host.evidence import Flight, GroupMembers
from stare_megatron.host.stacks import flight, read_flight

PIPELINE = GroupMembers("5", "PIPELINE_MODEL_PARALLEL_GROUP", (4, 6))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def as_nccl_writes(entry: dict[str, Any], **changes: Any) -> dict[str, Any]:
    kind = str(entry["profiling_name"]).removeprefix("gloo:")
    return entry | {"profiling_name": f"nccl:{kind}"} | changes


def finished() -> Flight:
    """What is recorded once gloo's own thread has noted the end of the last two, which is after the calls return."""
    deadline = time.monotonic() + 60
    while True:
        found = flight()
        assert found is not None
        if all(operation.finished for operation in found.operations[-2:]):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_collectives_of_both_recorders_are_read_in_the_order_they_were_entered(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.distributed.all_reduce(torch.ones(3))
    torch.distributed.broadcast(torch.ones(2), 0)
    alone = finished()
    reduced, sent = alone.operations[-2:]
    assert (reduced.kind, reduced.sizes, sent.kind) == ("all_reduce", ((3,),), "broadcast")

    dumped = pickle.loads(recorder._dump_fr_trace())
    first, last = dumped["entries"][-2:]
    between = (first["time_created_ns"] + last["time_created_ns"]) // 2
    waits = as_nccl_writes(first, time_created_ns=between, collective_seq_id=9, state="scheduled", retired=False)
    nccl = pickle.dumps(dumped | {"entries": [waits], "nccl_comm_state": {}}, protocol=2)
    monkeypatch.setattr(recorder, "_dump_nccl_trace", lambda: nccl, raising=False)
    both = flight()
    assert both is not None
    assert both.operations[:-3] == alone.operations[:-2]
    assert [(o.kind, o.number, o.finished) for o in both.operations[-3:]] == [
        ("all_reduce", reduced.number, True),
        ("all_reduce", 9, False),
        ("broadcast", sent.number, True),
    ]


def message(kind: str, number: int, state: str = "scheduled") -> dict[str, Any]:
    return {
        "process_group": ("5", PIPELINE.description),
        "p2p_seq_id": number,
        "collective_seq_id": 0,
        "profiling_name": f"nccl:{kind}",
        "input_sizes": [[2, 2]] if kind != "coalesced" else [],
        "state": state,
        "retired": state == "completed",
        "is_p2p": True,
    }


def test_messages_given_to_nccl_together_are_finished_when_their_last_entry_says_so() -> None:
    """As `batch_isend_irecv` leaves them: a message's own entry stays "scheduled" for ever."""
    entries = [
        message("send 0->1", 1),
        message("recv 0<-1", 1),
        message("coalesced", 1, "completed"),
        message("send 0->1", 2),
        message("recv 0<-1", 2),
        message("coalesced", 2, "started"),
        message("recv 0<-1", 3),
    ]
    read = read_flight({"entries": entries}, 4, (PIPELINE,))
    assert [(o.kind, o.number, o.peer, o.finished) for o in read.operations] == [
        ("send", 1, 6, True),
        ("recv", 1, 6, True),
        ("send", 2, 6, False),
        ("recv", 2, 6, False),
        ("recv", 3, 6, False),
    ]
