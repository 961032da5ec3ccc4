"""A judge behind a real HTTP server of this machine: verdicts, faults of the server, the key."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from stare_megatron import config
from stare_megatron.config import RewardConfig
from stare_megatron.errors import UserError
from stare_megatron.rewards import RewardError, check_prompts, make_reward
from tests.unit.rewards.test_rewards import PROMPT, Text, written

KEY = "sk-not-to-be-seen"


class Server:
    """Answers each request with the next of `answers`: a text, a (status, headers, body), or seconds to be silent."""

    def __init__(self, *answers):
        self.answers, self.asked, self.keys, self.at_once, self.most = list(answers), [], [], 0, 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.keys.append(self.headers.get("Authorization"))
                self._send(*(outer.answers[0] if isinstance(outer.answers[0], tuple) else (404, {}, "")))

            def do_POST(self):
                outer.keys.append(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.asked.append((self.path, body))
                    outer.at_once += 1
                    outer.most = max(outer.most, outer.at_once)
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = "Score: 1"
                with outer._lock:
                    outer.at_once -= 1
                if isinstance(answer, str):
                    answer = (200, {}, json.dumps({"choices": [{"message": {"content": answer}}]}))
                self._send(*answer)

            def _send(self, status, headers, body):
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body.encode()))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self._server.shutdown()
        self._server.server_close()


def judged(server, text="it is 30", prompt=PROMPT, count=1, **settings):
    async def main():
        table = {"name": "judge", "url": server.url, "model": "j", "judge_seconds": 30.0, **settings}
        reward = make_reward(RewardConfig.model_validate(table))
        try:
            asked = [reward(prompt, written("1"), Text(text)) for _ in range(count)]
            return (await asyncio.gather(*asked))[0]
        finally:
            await reward.close()

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """What would have been waited between attempts, s."""
    pauses, real = [], asyncio.sleep

    async def sleep(seconds, *rest):
        pauses.append(seconds)
        await real(0)

    monkeypatch.setattr("stare_megatron.rewards.judge.asyncio.sleep", sleep)
    return pauses


def test_what_the_judge_is_asked():
    with Server("well.\nScore: 1") as server:
        prompt = dataclasses.replace(PROMPT, extra={"q": "What is {answer}?"})
        score = judged(
            server,
            "<think>31?</think>thirty {problem}",
            prompt,
            template="{problem}|{answer}|{response}|{x}",
            system="be fair",
            problem_key="q",
            after="</think>",
            judge_tokens=77,
            judge_temperature=0.5,
            body={"seed": 3},
        )
        (path, body), *_ = server.asked
    assert (score.reward, score.correct, score.note) == (1.0, True, "judged 1")
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "j",
        "seed": 3,
        "max_tokens": 77,
        "temperature": 0.5,
        "messages": [
            {"role": "system", "content": "be fair"},
            {"role": "user", "content": "What is {answer}?|30|thirty {problem}|{x}"},
        ],
    }


@pytest.mark.parametrize(
    ("said", "settings", "reward"),
    [
        ("Score: 0", {}, 0.0),
        ("score: 1 ... no,\n**Score:** 0", {}, 0.0),
        ("<think>Score: 1</think>Score: 0", {}, 0.0),
        ("Score: 7", {"highest": 10.0}, 0.7),
        ("Score: -1", {"lowest": -1.0}, 0.0),
        ("Verdict: YES", {"verdict": r"Verdict: (\w+)"}, 1.0),
        ("incorrect", {"verdict": r"\b(?:in)?correct\b"}, 0.0),
        ('so:\n```json\n{"why": {"a": 1}, "grade": 4}\n```', {"json_key": "grade", "highest": 5.0}, 0.8),
        ('{"grade": 1} or {"grade": false}', {"json_key": "grade"}, 0.0),
        ("Score: 2", {}, None),
        ("I cannot say", {}, None),
        ("", {}, None),
        ('{"grade": null}', {"json_key": "grade"}, None),
        ("{" * 5000, {"json_key": "grade"}, None),
    ],
)
def test_verdicts(said, settings, reward):
    with Server(said) as server:
        if reward is None:
            with pytest.raises(RewardError, match="holds no score from"):
                judged(server, **settings)
            return
        score = judged(server, **settings)
    assert score.reward == pytest.approx(reward)
    assert score.correct is (reward == 1.0)


def test_a_pass_mark_and_half_a_surrogate_pair():
    with Server("Score: 8") as server:
        assert judged(server, "\ud800", highest=10.0, pass_mark=0.8).correct
        assert server.asked[0][1]["messages"][0]["content"].count("\ud800") == 1


def test_busy_servers_are_asked_again(no_pauses):
    busy = [(429, {"Retry-After": "7"}, "slow down"), (503, {}, "no"), (500, {}, "oh")]
    with Server(*busy, "Score: 1") as server:
        assert judged(server).correct
        assert len(server.asked) == 4
    assert [pause for pause in no_pauses if pause] == [7.0, 2.0, 4.0]
    with Server(busy[1]) as server:
        with pytest.raises(RewardError, match="no verdict in 2 attempts: HTTP 503 no"):
            judged(server, attempts=2)
        assert len(server.asked) == 2


def test_silence_and_a_dead_server_are_not_graded():
    quiet = pytest.raises(RewardError, match=r"no verdict in 1 attempts: no answer within 0.2 s")
    with Server(5.0, "Score: 1") as server, quiet:
        judged(server, judge_seconds=0.2, attempts=1)
    with pytest.raises(RewardError, match="no verdict in 2 attempts: ConnectError"):
        judged(server, attempts=2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, {}, "too long"), "the judge refuses: HTTP 400 too long"),
        ((200, {}, "<html>"), "is no chat completion: '<html>'"),
        ((200, {}, '{"choices": []}'), "is no chat completion"),
        ((200, {}, '{"choices": [{"message": {"content": null}}]}'), "raise reward.judge_tokens"),
    ],
)
def test_what_is_no_verdict_is_not_asked_for_again(answer, words):
    with Server(answer) as server:
        with pytest.raises(RewardError, match=words):
            judged(server)
        assert len(server.asked) == 1


def test_requests_under_way_are_bounded():
    with Server(0.5) as server:
        judged(server, count=6, concurrency=2)
        assert (len(server.asked), server.most) == (6, 2)


def test_the_key_is_sent_and_said_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    table = {"name": "judge", "model": "j", "api_key_env": "JUDGE_KEY"}
    with Server((401, {}, f"bad key {KEY}")) as server:
        with pytest.raises(RewardError, match=r"the judge refuses: HTTP 401$"):
            judged(server, api_key_env="JUDGE_KEY")
        reward = RewardConfig.model_validate(table | {"url": server.url})
        with pytest.raises(UserError, match="the server refuses the key in JUDGE_KEY"):
            check_prompts(reward, [], "t")
        assert server.keys == [f"Bearer {KEY}"] * 2
        with pytest.raises(UserError, match=r"a request without a key: set reward.api_key_env"):
            check_prompts(RewardConfig.model_validate({"name": "judge", "model": "j", "url": server.url}), [], "t")
    with Server((400, {}, f"{KEY} is odd")) as server, pytest.raises(RewardError, match=r"HTTP 400 \*\*\* is odd"):
        judged(server, api_key_env="JUDGE_KEY")
    assert KEY not in caplog.text + repr(reward) + reward.model_dump_json()
    for value in ("", "two\nlines"):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(
            UserError, match=r"reward.api_key_env = 'JUDGE_KEY': that environment variable holds no key"
        ):
            check_prompts(reward, [], "t")


def test_nobody_at_the_address_is_refused_at_the_door():
    with Server("Score: 1") as server:
        reward = RewardConfig.model_validate({"name": "judge", "model": "j", "url": server.url})
        check_prompts(reward, [PROMPT], "t")
    with pytest.raises(UserError, match=r"reward.url = .*: nobody answers \(ConnectError"):
        check_prompts(reward, [PROMPT], "t")


def test_a_template_from_a_file_is_kept_as_text(tmp_path):
    (tmp_path / "judge.txt").write_text("Is {response} like {answer}?")
    table = {"name": "judge", "model": "j", "url": "http://h/v1", "template_file": str(tmp_path / "judge.txt")}
    made = RewardConfig.model_validate(table)
    assert made.model_dump()["template"] == "Is {response} like {answer}?"
    assert made.model_dump()["template_file"] == ""
    assert "{response}" in RewardConfig.model_validate(table | {"template_file": ""}).model_dump()["template"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template_file": "nowhere.txt"}, "template_file = '.*nowhere.txt': cannot be read"),
        ({"template_file": "a", "template": "{response}"}, "both set: take one out"),
        ({"template": "{answer}"}, r"template has no \{response\}"),
        ({"verdict": "("}, "verdict = '\\(' is no regular expression"),
        ({"lowest": 1.0}, "lowest = 1 is not below highest = 1"),
        ({"body": {"stream": True}}, "body holds 'stream'"),
        ({"url": "localhost:8000"}, "reward.url = 'localhost:8000': must match"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    tree = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": ["t"]}}
    reward = {"name": "judge", "model": "j", "url": "http://h/v1", **settings}
    with pytest.raises(UserError, match=words):
        config.parse(tree | {"reward": reward}, "test")
