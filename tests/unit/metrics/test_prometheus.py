"""What a Prometheus server reads, asked over HTTP."""

from __future__ import annotations

import http.client
import io
import re
import socket
import urllib.error
import urllib.request

import pytest
from rich.console import Console

from stare_megatron.config import LoggingConfig, parse
from stare_megatron.errors import UserError
from stare_megatron.host.pages import Page, PageServer
from stare_megatron.host.ports import free_port
from stare_megatron.metrics.catalogue import metrics
from stare_megatron.metrics.prometheus import PrometheusSink, expose
from stare_megatron.metrics.sinks import open_sinks
from stare_megatron.run import preflight

# A line of the text format 0.0.4: a comment, or name, labels and value.
LINE = re.compile(
    r"# (HELP|TYPE) [a-zA-Z_:][a-zA-Z0-9_:]* .+"
    r'|[a-zA-Z_:][a-zA-Z0-9_:]*\{([a-z]+="([^"\\\n]|\\.)*",?)+\} (NaN|[+-]Inf|[-+0-9.e]+)'
)


def read(url: str) -> dict[str, float]:
    """Series -> value; every line is one of the format, and all lines of a name are together."""
    with urllib.request.urlopen(url, timeout=120) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        lines = answer.read().decode().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    return {series: float(value) for series, _, value in (s.rpartition(" ") for s in lines if s[0] != "#")}


def config(**logging):
    tree = {"model": {"path": "m"}, "data": {"train": ["a.jsonl"]}, "reward": {"name": "math"}}
    run = {"run": {"name": "unit", "steps": 9}}
    logging = {"wandb": "disabled", "tensorboard": False} | logging
    return parse(tree | run | {"logging": logging}, "test")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_values_are_served_where_the_settings_say(tmp_path, host):
    port = free_port()
    sinks = open_sinks(
        config(prometheus_port=port, prometheus_host=host), tmp_path, 0, True, Console(file=io.StringIO())
    )
    url = f"http://127.0.0.1:{port}/metrics"
    before = read(url)
    assert before['stare_megatron_step{run="unit"}'] == 0
    assert before['stare_megatron_steps{run="unit"}'] == 9
    sinks.log(1, metrics({"reward/mean": 0.25, "sync/probe": float("nan")}), metrics({"time/save": 0.0}))
    sinks.complete(1, metrics({"time/save": 2.5, "mismatch/max": float("inf")}))
    found = read(url)
    assert found['stare_megatron_step{run="unit"}'] == 1
    assert found['stare_megatron_reward_mean{run="unit"}'] == 0.25
    assert found['stare_megatron_time_save{run="unit"}'] == 2.5
    assert found['stare_megatron_mismatch_max{run="unit"}'] == float("inf")
    assert found['stare_megatron_sync_probe{run="unit"}'] != found['stare_megatron_sync_probe{run="unit"}'], "NaN"
    sinks.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=120)


def test_a_step_replaces_the_one_before_and_an_evaluation_stays():
    sink = PrometheusSink(LoggingConfig(prometheus_port=free_port()), "unit", 5)
    sink.log(1, metrics({"age/3/tokens": 7.0, "reward/mean": 0.5}))
    sink.log(1, metrics({"eval/avg": 0.75}))
    sink.log(2, metrics({"reward/mean": 0.625}))
    found = read(sink.url)
    sink.close()
    assert found['stare_megatron_eval_avg{run="unit"}'] == 0.75
    assert found['stare_megatron_reward_mean{run="unit"}'] == 0.625
    assert not [series for series in found if "age" in series], "no step has it any more"


def test_members_of_a_family_that_are_written_alike_are_told_apart():
    names = ["eval/a-b/avg@8", "eval/a_b/avg@8"]
    lines = expose(metrics(dict.fromkeys(names, 0.5)), 'q"uote')
    assert [line for line in lines if line[0] != "#"] == [
        f'stare_megatron_eval_a_b_avg_8{{run="q\\"uote",name="{name}"}} 0.5' for name in names
    ]
    assert all(LINE.fullmatch(line) for line in lines)


def test_nothing_else_is_there():
    sink = PrometheusSink(LoggingConfig(prometheus_port=free_port()), "unit", 5)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(sink.url + "x", timeout=120)
    sink.close()


def test_a_taken_port_is_refused_at_the_door(monkeypatch):
    for name in ("check_packages", "check_data", "check_weights", "check_initial", "check_trainer_options"):
        monkeypatch.setattr(preflight, name, lambda *_: None)
    for name in ("check_layout", "check_window", "check_cluster", "read_hf_config"):
        monkeypatch.setattr(preflight, name, lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"logging.prometheus_port = {port}: cannot listen .*choose another port"):
            preflight.check(config(prometheus_port=port))
    with pytest.raises(UserError, match=r"on no\.such\.host\.invalid"):
        preflight.check(config(prometheus_port=port, prometheus_host="no.such.host.invalid"))


@pytest.mark.parametrize(("asked", "status"), [("localhost:1", 200), ("127.0.0.1", 200), ("evil.example:80", 403)])
def test_a_name_that_was_made_to_lead_here_gets_nothing(asked, status):
    server = PageServer("127.0.0.1", 0, Page)
    server.start()
    client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    client.request("GET", "/", headers={"Host": asked})
    assert client.getresponse().status == status
    client.close()
    server.stop()
