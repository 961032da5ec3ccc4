"""Every file of attacks/ at every level that this machine gives and that is said to contain it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stare_megatron.errors import RunError
from stare_megatron.sandbox.level import Level
from tools.attack_sandbox import LIMITS, Arena, read_attack

FOLDER = Path(__file__).parent / "attacks"
ATTACKS = {path.stem: read_attack(path) for path in sorted(FOLDER.glob("*.py"))}
CASES = [(level, name) for level in Level for name, attack in ATTACKS.items() if attack.weakest <= level]
# What the harness must notice where nothing holds it back; one kind of evidence each, nothing that stays.
SEEN_AT_LIMITS = {
    "tcp": "the TCP listener was connected to",
    "udp": "the UDP socket was written to",
    "abstract_socket": "the abstract listener was connected to",
    "public_file": "a secret was read",
    "rename_out": "a file outside was written: thing",
    "namespaces_of_its_own": "ESCAPED new namespace user",
}


class LevelArena:
    """An arena and the event loop it lives in."""

    def __init__(self, level: Level) -> None:
        self._runner = asyncio.Runner()
        self._arena = Arena(LIMITS, level)
        self._runner.run(self._arena.__aenter__())

    def attack(self, name: str):
        return self._runner.run(self._arena.attack(ATTACKS[name]))

    def close(self) -> None:
        self._runner.run(self._arena.__aexit__(None, None, None))
        self._runner.close()


@pytest.fixture(scope="module")
def arena_at():
    """Arenas by level, each made once; a level that this machine does not give skips its tests."""
    made: dict[Level, LevelArena | str] = {}

    def at(level: Level) -> LevelArena:
        if level not in made:
            try:
                made[level] = LevelArena(level)
            except RunError as e:
                made[level] = str(e)
        found = made[level]
        if isinstance(found, str):
            pytest.skip(found)
        return found

    yield at
    for arena in made.values():
        if isinstance(arena, LevelArena):
            arena.close()


@pytest.mark.parametrize(("level", "name"), CASES, ids=[f"{level.value}-{name}" for level, name in CASES])
def test_attack_is_contained(arena_at, level, name):
    results, leaks = arena_at(level).attack(name)
    assert leaks == []
    ended = {result.status for result in results}
    assert ended <= set(ATTACKS[name].expect), results


def test_harness_notices_what_is_not_contained(arena_at):
    for name, evidence in SEEN_AT_LIMITS.items():
        _, leaks = arena_at(Level.LIMITS).attack(name)
        assert evidence in leaks, name


def test_every_attack_says_what_it_expects():
    assert [name for name, attack in ATTACKS.items() if not attack.expect] == []
    assert [path.name for path in FOLDER.glob("*.py") if not path.read_text().startswith("# ")] == []


def test_page_lists_what_each_level_does_not_contain():
    """docs/sandbox.md names every attack that some level does not contain, in the row of the weakest that does."""
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    table = page.partition("attacks stopped from here on")[2].partition("\n\n")[0]
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| `")}
    for name, attack in ATTACKS.items():
        for level in Level:
            listed = f"`{name}`" in rows[f"`{level.value}`"]
            assert listed == (attack.weakest is level and level is not Level.LIMITS), (name, level)
