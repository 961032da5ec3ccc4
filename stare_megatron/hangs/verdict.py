"""The culprit of a hang, from what each rank has entered and what each process is at. Pure.

A rank waits for every member of a group that has not entered an operation which it has entered itself and which is not
finished; in a pipeline, for its neighbours. These waits are a directed graph. Who is waited for and waits for nobody is
the culprit. Where there is no such rank the waits go in a circle, and all ranks of the circle are named.

The ranks' numbers of collectives are those of torch's flight recorder, which counts each group's from its beginning, so
that equal numbers are one and the same collective.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.hangs.witness import Witness
from stare_megatron.host.evidence import Frame, GroupMembers, Operation

_MOST = 4  # names in a line
_PIPELINE = "PIPELINE_MODEL_PARALLEL"
_MESSAGES = "p2p_communication.py"  # Megatron-Core's; gloo's recorder has collectives only
_ALIKE = ("all_reduce", "broadcast", "reduce_scatter", "all_gather")  # their parts have one size on all ranks


@dataclass(frozen=True)
class Verdict:
    """One line, and the names of the processes at fault; none where it is not a process."""

    line: str
    culprits: tuple[str, ...]


@dataclass(frozen=True)
class _Wait:
    """`rank` waits for `missing` in an operation, which all have entered if there are none; None: in a message of a
    pipeline."""

    rank: int
    operation: Operation | None
    group: GroupMembers
    missing: tuple[int, ...]


def verdict(witnesses: Sequence[Witness]) -> Verdict:
    """Of the processes that are waited for. Trainer ranks among them are all of the run's."""
    ranks = {s.rank: s for s in witnesses if s.rank >= 0}
    waits = list(_waits(ranks))
    held = [s for s in witnesses if s.outside]
    found = _disagreement(ranks) or _missing(ranks, waits) or _unfinished(ranks, waits) or _circle(ranks, waits)
    if held and not (found and set(found.culprits) & {s.name for s in held}):
        lines = [f"{s.name} {s.outside}" for s in held]
        lines += [found.line] if found else []
        return Verdict("; ".join(lines), tuple(s.name for s in held))
    return found or _at(witnesses)


def _waits(ranks: Mapping[int, Witness]) -> Iterator[_Wait]:
    for rank, witness in ranks.items():
        if witness.flight is None:
            continue
        groups = {group.name: group for group in witness.flight.groups}
        for operation in witness.flight.operations:
            group = groups.get(operation.group)
            if operation.finished or group is None:
                continue
            if operation.peer is not None:
                yield _Wait(rank, operation, group, (operation.peer,))
                continue
            missing = [r for r in group.ranks if r != rank and not _entered(ranks.get(r), operation)]
            yield _Wait(rank, operation, group, tuple(missing))
        if any(frame.file.endswith(_MESSAGES) for frame in witness.frames):
            for group in witness.flight.groups:
                if _PIPELINE in group.description and rank in group.ranks:
                    place = group.ranks.index(rank)
                    beside = group.ranks[max(0, place - 1) : place] + group.ranks[place + 1 : place + 2]
                    yield _Wait(rank, None, group, beside)


def _entered(witness: Witness | None, operation: Operation) -> bool:
    """Whether a rank has entered it, or a later one of the group. Who does not answer has not: it would have ended up
    in the same wait as the others."""
    if witness is None or witness.flight is None:
        return False
    return any(
        o.peer is None and o.group == operation.group and o.number >= operation.number
        for o in witness.flight.operations
    )


def _missing(ranks: Mapping[int, Witness], waits: Sequence[_Wait]) -> Verdict | None:
    """Ranks that are waited for and wait for nobody."""
    waiting = {wait.rank for wait in waits}
    ends = {rank for wait in waits for rank in wait.missing} - waiting
    if not ends:
        return None
    names = {rank: _name(ranks, rank) for rank in ends}
    # Of the operations that wait for them directly the one with most ranks in it: the most telling.
    direct = [wait for wait in waits if set(wait.missing) & ends]
    alike = collections.Counter(_key(wait) for wait in direct if wait.operation is not None)
    if not alike:
        others = {wait.rank for wait in direct}
        line = f"{several(names.values())} sent no message; {_others(ranks, others, ends)} for it in the pipeline"
        return Verdict(line + _whereabouts(ranks, ends), tuple(names.values()))
    (key, _), *_ = alike.most_common(1)
    inside = [wait for wait in direct if wait.operation is not None and _key(wait) == key]
    culprits = sorted(ends & {rank for wait in inside for rank in wait.missing})
    line = (
        f"{several(names[c] for c in culprits)} never entered {_called(inside[0])}; "
        f"{_others(ranks, {wait.rank for wait in waits}, set(culprits))}"
    )
    return Verdict(line + _whereabouts(ranks, culprits), tuple(names[c] for c in culprits))


def _key(wait: _Wait) -> tuple[str, int]:
    assert wait.operation is not None
    return wait.operation.group, wait.operation.number


def _called(wait: _Wait) -> str:
    assert wait.operation is not None
    return f"{wait.operation.kind} #{wait.operation.number} of {group_called(wait.group)}"


def _others(ranks: Mapping[int, Witness], waiting: Collection[int], culprits: Collection[int]) -> str:
    rest = set(ranks) - set(culprits)
    if rest and rest <= set(waiting):
        return "the others wait" if len(rest) > 1 else f"{_name(ranks, *rest)} waits"
    names = [_name(ranks, rank) for rank in sorted(set(waiting) - set(culprits))]
    return f"{several(names)} {'wait' if len(names) > 1 else 'waits'}"


def _whereabouts(ranks: Mapping[int, Witness], culprits: Collection[int]) -> str:
    """What each of the first few is at."""
    told = [(ranks[c].name, _state(ranks[c])) for c in sorted(culprits)[:3] if c in ranks]
    return "".join(f"; {name if len(told) > 1 else 'it'} {state}" for name, state in told if state)


def _disagreement(ranks: Mapping[int, Witness]) -> Verdict | None:
    """All have entered, not the same: the operation that some of a group have not finished is another on others."""
    entered: dict[tuple[str, int], dict[int, Operation]] = {}
    for rank, witness in ranks.items():
        for operation in witness.flight.operations if witness.flight else ():
            if operation.peer is None:
                entered.setdefault((operation.group, operation.number), {})[rank] = operation
    for at in entered.values():
        if all(operation.finished for operation in at.values()):
            continue
        for what in (_kind, _sized):
            seen = collections.Counter(what(operation) for operation in at.values())
            if len(seen) > 1:
                usual = seen.most_common(1)[0][0]
                odd = [rank for rank, operation in at.items() if what(operation) != usual]
                own = next(operation for operation in at.values() if what(operation) == usual)
                group = _group(ranks, own)
                line = (
                    f"{several(_name(ranks, r) for r in odd)} entered {what(at[odd[0]])} where the others entered "
                    f"{what(own)}, #{own.number} of {group}"
                )
                return Verdict(line, tuple(_name(ranks, r) for r in odd))
    return None


def _kind(operation: Operation) -> str:
    return operation.kind


def _sized(operation: Operation) -> str:
    if operation.kind not in _ALIKE:
        return operation.kind
    return f"{operation.kind} of {' '.join(str(list(size)) for size in operation.sizes)}"


def _unfinished(ranks: Mapping[int, Witness], waits: Sequence[_Wait]) -> Verdict | None:
    """All have entered the same, and it does not end."""
    for wait in waits:
        if wait.operation is not None and not wait.missing:
            where = f"{_called(wait)}, and it does not end on {_name(ranks, wait.rank)}"
            return Verdict(f"all ranks entered {where}: the network or a device", ())
    return None


def _circle(ranks: Mapping[int, Witness], waits: Sequence[_Wait]) -> Verdict | None:
    """Everybody waits for somebody who waits."""
    if not waits:
        return None
    parts: list[str] = []
    for wait in waits:
        where = _called(wait) if wait.operation else "a message of its pipeline"
        waited = several(_name(ranks, r) for r in wait.missing)
        parts.append(f"{_name(ranks, wait.rank)} in {where} for {waited}")
    names = dict.fromkeys(_name(ranks, wait.rank) for wait in waits)
    return Verdict(f"ranks wait for each other: {'; '.join(parts[:8])}", tuple(names))


def _at(witnesses: Sequence[Witness]) -> Verdict:
    """Nobody is known to wait: what each is at, those that are at the same together."""
    silent = [s for s in witnesses if not s.answers]
    chosen = silent or list(witnesses)
    together: dict[str, list[str]] = {}
    for witness in chosen:
        together.setdefault(_state(witness) or "did not answer", []).append(witness.name)
    line = "; ".join(f"{several(names)}: {state}" for state, names in list(together.items())[:4])
    return Verdict(line, tuple(s.name for s in chosen))


def _state(witness: Witness) -> str:
    """What a process is at, for the end of a line."""
    if witness.outside:
        return witness.outside
    parts: list[str] = []
    if witness.activity:
        parts.append(f"has been at {witness.activity}")
    if witness.frames:
        parts.append(f"is in {_telling(witness.frames)}")
    top = witness.processes[0] if witness.processes else None
    if top is not None and top.status == "disk-sleep":
        parts.append(f"sleeps in the kernel{f' in {top.waits_in}' if top.waits_in else ''}")
    if not witness.answers and not parts:
        parts.append("does not answer; its stacks are in the folder")
    return ", ".join(parts)


def _telling(frames: Sequence[Frame]) -> str:
    """The innermost call that is not a library's, and within it the innermost of all."""
    own = next((f for f in frames if "site-packages" not in f.file and "/lib/python" not in f.file), frames[0])
    return str(own) if own is frames[0] else f"{frames[0]} under {own}"


def _group(ranks: Mapping[int, Witness], operation: Operation) -> str:
    for witness in ranks.values():
        for group in witness.flight.groups if witness.flight else ():
            if group.name == operation.group:
                return group_called(group)
    return f"group {operation.group}"


def group_called(group: GroupMembers) -> str:
    """A group as people call it: "the tensor-parallel group"."""
    if group.description in ("default_pg", "", "undefined"):
        return "the group of all ranks" if group.description == "default_pg" else f"group {group.name}"
    words = group.description.lower().removesuffix("_group").replace("_group_", "_").replace("_model_", "_")
    return f"the {words.replace('_', '-')} group"


def _name(ranks: Mapping[int, Witness], rank: int) -> str:
    return ranks[rank].name if rank in ranks else f"rank {rank}"


def several(names: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c", "a, b, c and 5 more"."""
    every = list(names)
    if len(every) > _MOST:
        every[_MOST - 1 :] = [f"{len(every) - _MOST + 1} more"]
    return " and ".join([", ".join(every[:-1]), every[-1]] if every[1:] else every)
