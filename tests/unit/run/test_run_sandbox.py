"""`[sandbox]` of a run, at the door: what is refused, and what is said of the level."""

from __future__ import annotations

import pytest

from stare_megatron import config
from stare_megatron.cluster import placement
from stare_megatron.errors import UserError
from stare_megatron.run import preflight
from stare_megatron.sandbox.detect import Found
from stare_megatron.sandbox.level import Level

TOOL = {"name": "tool_use", "parser": "retool"}


def make(**tables):
    tree = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}, "reward": {"name": "math"}}
    return config.parse(tree | tables, "test")


def test_without_a_tool_nothing_is_looked_for(monkeypatch):
    monkeypatch.setattr(preflight, "detect", None)
    assert preflight.check_sandbox(make(sandbox={"require": "namespaces"})) == ""
    assert placement.actors(make(), 2) == 4


def test_the_level_found_is_said(monkeypatch):
    async def detect(require):
        assert require is Level.FILTER
        return Found(Level.NAMESPACES, True, {})

    monkeypatch.setattr(preflight, "detect", detect)
    made = make(env=TOOL, sandbox={"require": "filter", "actors": 3, "actor_cpus": 0.5})
    assert preflight.check_sandbox(made) == "level namespaces with Landlock, 3 actors of 2 workers"
    assert placement.actors(made, 2) == 6


def test_a_level_that_is_not_there_is_refused_with_its_cure(monkeypatch):
    async def why_not(level):
        return "the kernel has none"

    monkeypatch.setattr("stare_megatron.sandbox.detect.why_not", why_not)
    with pytest.raises(UserError) as e:
        preflight.check_sandbox(make(env=TOOL, sandbox={"require": "landlock"}))
    for part in ("sandbox.require = 'landlock'", "the kernel has none", "Linux 5.13", "lower sandbox.require"):
        assert part in str(e.value)


def test_a_server_that_does_not_answer_is_refused():
    with pytest.raises(UserError, match=r"sandbox\.url = 'http://127\.0\.0\.1:9'.*start one"):
        preflight.check_sandbox(make(env=TOOL, sandbox={"url": "http://127.0.0.1:9", "retries": 0}))


def test_on_a_cluster_the_nodes_decide(monkeypatch):
    monkeypatch.setattr(preflight, "detect", None)
    made = make(env=TOOL, cluster={"address": "auto"}, sandbox={"actors": 4, "node_resource": "cpu_node"})
    assert preflight.check_sandbox(made) == "4 actors of 2 workers, at level landlock or stronger"


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"env": TOOL | {"keep_state": True}, "sandbox": {"url": "http://x"}}, "keep_state = true: the server"),
        ({"sandbox": {"node_resource": "cpu_node"}}, 'cluster.address is "local"'),
        ({"sandbox": {"actors": 0}}, "sandbox.actors"),
    ],
)
def test_settings_that_contradict_each_other(tables, message):
    with pytest.raises(UserError, match=message):
        make(**tables)
