"""What this process is at: stacks of its threads, and the operations that torch's flight recorder has of it."""

from __future__ import annotations

import faulthandler
import pickle
import re
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from stare_megatron.host.evidence import Flight, Frame, GroupMembers, Operation, ThreadStack

STACKS_SIGNAL = signal.SIGUSR1
_DEEPEST = 100
# Of what the recorder has, what is sent on: hundreds of ranks may answer one driver at once.
_NEWEST = 200
_CALLS = 8
_DUMPS = ("_dump_fr_trace", "_dump_nccl_trace")
# The entry that ends operations which NCCL was given together.
_TOGETHER = "nccl:coalesced"
_PEER = re.compile(r"(\d+)\s*(?:->|<-)\s*(\d+)")


def write_stacks_on_signal() -> None:
    """From now on SIGUSR1 makes this process write the Python stacks of all its threads to its stderr. It does so
    whatever the threads do, also within C code that never gives the interpreter back, but not while it is stopped."""
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)


def thread_stacks() -> tuple[ThreadStack, ...]:
    """Of every thread that runs Python."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return tuple(
        ThreadStack(key, names.get(key, "?"), tuple(_frames(top))) for key, top in sys._current_frames().items()
    )


def _frames(top: FrameType | None) -> list[Frame]:
    found: list[Frame] = []
    while top is not None and len(found) < _DEEPEST:
        found.append(Frame(top.f_code.co_qualname, top.f_code.co_filename, top.f_lineno))
        top = top.f_back
    return found


def flight() -> Flight | None:
    """Of this rank; None where the process has not joined torch.distributed. torch keeps as many operations as
    TORCH_FR_BUFFER_SIZE says (`device.trainer_environment`): on gloo collectives, on NCCL messages too."""
    if "torch" not in sys.modules:
        return None
    import torch
    from torch.distributed import distributed_c10d

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    world = distributed_c10d._world
    groups = tuple(
        GroupMembers(str(world.pg_names[group]), group.group_desc, tuple(sorted(ranks, key=ranks.__getitem__)))
        for group, ranks in list(world.pg_group_ranks.items())
        if group in world.pg_names  # a mark stands for the groups that others are in
    )
    return read_flight(_recorded(), torch.distributed.get_rank(), groups)


def _recorded() -> dict[str, Any]:
    """Of all of torch's recorders in the order of time: there is one for gloo, and one for NCCL in builds that have
    NCCL."""
    recorder = vars(sys.modules["torch._C._distributed_c10d"])
    dumps = [pickle.loads(recorder[name]()) for name in _DUMPS if name in recorder]
    entries = [entry for dump in dumps for entry in dump.get("entries", ())]
    return {"entries": sorted(entries, key=lambda entry: entry["time_created_ns"])}


def read_flight(recorded: Mapping[str, Any], rank: int, groups: Sequence[GroupMembers]) -> Flight:
    """From what torch's flight recorder writes (format 2.10; gloo and NCCL). `groups`: of this rank, which the recorder
    of gloo does not know. What is not finished, the newest of each group and the newest 200 of all are taken, with the
    innermost calls of their stacks.

    Operations that NCCL was given together (a pipeline's batch of messages) have one number and an entry that ends
    them. Only that entry is ever finished, and says so for all of them.
    """
    by_name = {group.name: group for group in groups}
    entries = recorded.get("entries", ())
    ended = {_place(entry): _finished(entry) for entry in entries if entry["profiling_name"] == _TOGETHER}
    every = [
        _operation(entry, rank, by_name, ended.get(_place(entry), False))
        for entry in entries
        if entry["profiling_name"] != _TOGETHER
    ]
    last = {(o.group, o.peer is None): n for n, o in enumerate(every)}
    kept = {*last.values(), *range(len(every) - _NEWEST, len(every))}
    return Flight(rank, tuple(groups), tuple(o for n, o in enumerate(every) if n in kept or not o.finished))


def _place(entry: Mapping[str, Any]) -> tuple[str, bool, int]:
    """The group, whether it is a message, and the number: what operations that were given together share."""
    message = bool(entry["is_p2p"])
    return str(entry["process_group"][0]), message, int(entry["p2p_seq_id" if message else "collective_seq_id"])


def _finished(entry: Mapping[str, Any]) -> bool:
    return bool(entry["retired"]) or entry["state"] == "completed"


def _operation(
    entry: Mapping[str, Any], rank: int, groups: Mapping[str, GroupMembers], ended_together: bool
) -> Operation:
    name, message, number = _place(entry)
    kind = str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])
    return Operation(
        group=name,
        number=number,
        kind=kind.split()[0] if message else kind,
        sizes=tuple(tuple(size) for size in entry["input_sizes"]),
        finished=ended_together or _finished(entry),
        peer=_peer(kind, rank, groups.get(name)) if message else None,
        frames=tuple(Frame(f["name"], f["filename"], int(f["line"])) for f in entry.get("frames", ())[:_CALLS]),
    )


def _peer(kind: str, rank: int, group: GroupMembers | None) -> int | None:
    """Of "send 0->1" or "recv 0<-1", whose numbers are places in the group."""
    named = _PEER.search(kind)
    if named is None or group is None:
        return None
    ranks = [group.ranks[place] for place in map(int, named.groups()) if place < len(group.ranks)]
    return next((other for other in ranks if other != rank), None)
