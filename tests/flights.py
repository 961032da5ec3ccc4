"""Flight records that a hang's folder holds, read back."""

from __future__ import annotations

import json

from stare_megatron.host.evidence import Flight, GroupMembers, Operation


def read_flight_json(text: str) -> Flight:
    """What `flight_json` wrote, without the stacks of the operations."""
    data = json.loads(text)
    groups = [GroupMembers(g["name"], g["description"], tuple(g["ranks"])) for g in data["groups"]]
    operations = [
        Operation(
            group=o["group"],
            number=o["number"],
            kind=o["kind"],
            sizes=tuple(tuple(size) for size in o["sizes"]),
            finished=o["finished"],
            peer=o["peer"],
        )
        for o in data["operations"]
    ]
    return Flight(data["rank"], tuple(groups), tuple(operations))
