"""The environment with a tool: what it runs, shows and refuses, and how its episodes end."""

from __future__ import annotations

import asyncio
import contextlib
import json

import numpy as np
import pytest

from stare_megatron.config import parse
from stare_megatron.config.env import ToolUseConfig
from stare_megatron.envs.parsers import make_parser
from stare_megatron.envs.parsers.base import Encoder, Malformed, Parsed, Request
from stare_megatron.envs.tool_use import ToolUse
from stare_megatron.errors import UserError
from stare_megatron.rollout.episode import Masks, run_episode, run_group
from stare_megatron.sandbox.result import Result, lost
from stare_megatron.sandbox.result import Status as Outcome
from stare_megatron.types import (
    Call,
    Completion,
    EpisodeCounts,
    GroupRequest,
    Prompt,
    Sampling,
    Score,
    SpanKind,
    Status,
    Turn,
)
from tests import byte_tokenizer

TOKENIZER = byte_tokenizer.make()
EOS = TOKENIZER.eos_token_id
PROMPT = Prompt("p", "s", "q", tuple(TOKENIZER.encode("q")), "")
SAMPLING = Sampling(4000, 1.0, 1.0, (), 0)


def call(code: str, name: str = "python") -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'code': code}})}\n</tool_call>"


class Box:
    """Answers from a list; remembers what it was given."""

    def __init__(self, *results: Result, hang: bool = False) -> None:
        self._results = list(results)
        self._hang = hang
        self.codes: list[str] = []
        self.seconds: list[float] = []
        self.opened = self.closed = 0

    async def run(self, code: str, stdin: str = "", *, echo: bool = False, seconds: float = 0.0) -> Result:
        self.codes.append(code)
        self.seconds.append(seconds)
        if self._hang:
            await asyncio.sleep(3600)
        return self._results.pop(0) if self._results else said("4\n")

    @contextlib.asynccontextmanager
    async def session(self):
        self.opened += 1
        yield self
        self.closed += 1

    async def check(self) -> bool:
        return True


class Script:
    """Says one text after the other; what it was asked and with which stop strings."""

    version = 1

    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)
        self.asked: list[list[int]] = []
        self.stop: tuple[str, ...] = ()

    async def sample(self, token_ids, sampling) -> Completion:
        self.asked.append(list(token_ids))
        self.stop = sampling.stop
        ids = np.array(TOKENIZER.encode(self._texts.pop(0)), np.int32)
        return Completion(ids, np.full(len(ids), -0.5, np.float32), Status.COMPLETED, self.version)


def said(text: str, status: Outcome = Outcome.OK, stderr: str = "", value: str = "") -> Result:
    return Result(status, text, stderr, value, 0, 1.0, 250.0)


def play(script: Script, box: Box | None = None, **settings):
    config = ToolUseConfig.model_validate(settings)
    env = ToolUse(PROMPT, box or Box(), TOKENIZER, config)
    trajectory, note = asyncio.run(run_episode(PROMPT, 0, env, script, SAMPLING))
    observed = [TOKENIZER.decode(s.token_ids.tolist()) for s in trajectory.spans if s.kind is SpanKind.OBSERVATION]
    return trajectory, note, observed


def test_a_call_is_run_and_its_result_is_a_turn_of_the_template():
    script, box = Script("I try" + call("print(2 + 2)"), "It is 4.<|im_end|>"), Box()
    trajectory, note, observed = play(script, box)
    assert observed == [
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    ]
    assert (trajectory.status, note, box.codes, script.stop) == (
        Status.COMPLETED,
        "",
        ["print(2 + 2)"],
        ("</tool_call>",),
    )
    assert script.asked[1] == trajectory.token_ids()[: len(script.asked[1])].tolist()
    assert trajectory.turns == (Turn((Call("python", "print(2 + 2)", "ok", 0.25),), void=False), Turn((), void=False))
    size = len(TOKENIZER.encode(observed[0]))
    assert trajectory.counts() == EpisodeCounts(2, 1, 0, 0.25, size, void=False)


@pytest.mark.parametrize("echo", [True, False])
def test_echo_is_asked_of_the_tool(echo):
    asked = []

    class Asked(Box):
        async def run(self, code, stdin="", *, echo=False, seconds=0.0):
            asked.append(echo)
            return await super().run(code, stdin, echo=echo, seconds=seconds)

    play(Script(call("1"), "4<|im_end|>"), Asked(), echo=echo)
    assert asked == [echo]


def test_an_end_of_sequence_after_a_call_is_not_written_twice():
    script = Script(call("1") + "<|im_end|>", "4<|im_end|>")
    trajectory, _, observed = play(script, parallel_calls=True)
    assert script.stop == ()
    assert observed[0].startswith("\n<|im_start|>user\n<tool_response>")
    assert TOKENIZER.decode(trajectory.token_ids().tolist()).count("</tool_call><|im_end|>\n<|im_start|>user") == 1


def test_every_end_of_sequence_ends_a_turn_of_calls():
    """A checkpoint's generation_config.json may name several, and engines stop at each."""
    trajectory, note, observed = play(Script(call("1") + "<|endoftext|>", "4<|im_end|>"), parallel_calls=True)
    assert (trajectory.status, note, trajectory.counts().calls) == (Status.COMPLETED, "", 1)
    assert observed[0].startswith("\n<|im_start|>user\n<tool_response>")
    tokenizer = byte_tokenizer.make(eos="<|endoftext|>")
    assert make_parser(ToolUseConfig(), tokenizer).render(call("1"), [[1]], ended=True) is not None


def test_an_end_of_sequence_that_no_template_continues_cannot_be_followed():
    template = byte_tokenizer.TEMPLATE.replace('m.content + "<|im_end|>', 'm.content + "END')
    parser = make_parser(ToolUseConfig(), byte_tokenizer.make(template))
    assert parser.render(call("1"), [[1]], ended=True) is None
    assert parser.render(call("1"), [[1]], ended=False) is not None


def test_several_calls_of_a_turn_run_in_order():
    script, box = Script(call("a") + "and" + call("b") + "<|im_end|>", "x<|im_end|>"), Box(said("1"), said("2"))
    trajectory, _, observed = play(script, box, parallel_calls=True)
    assert box.codes == ["a", "b"]
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>" in observed[0]
    assert trajectory.counts().calls == 2


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("<tool_call>{'name'}</tool_call>", "not valid JSON"),
        ("<tool_call>[1]</tool_call>", "must be a JSON object"),
        ("<tool_call>" + "[" * 2000 + "</tool_call>", "not valid JSON"),
        ("no opening</tool_call>", "without <tool_call>"),
        (call("1", name="ruby"), "unknown tool 'ruby'; known: 'python'"),
        ('<tool_call>{"name": "python", "arguments": {"x": 1}}</tool_call>', 'string "code"'),
        ("<tool_call>{}<|im_end|>", "without </tool_call>"),
    ],
)
def test_a_call_that_cannot_be_read_is_answered_with_its_error(text, error):
    box = Box()
    trajectory, _, observed = play(Script(text, "x<|im_end|>"), box)
    assert "Error: " in observed[0]
    assert error in observed[0]
    assert (box.codes, trajectory.status) == ([], Status.COMPLETED)
    assert [c.outcome for c in trajectory.turns[0].calls] == ["malformed"]
    assert trajectory.counts().call_errors == 1
    ended, _, observed = play(Script(text), call_errors="end")
    assert (ended.status, observed, ended.counts().call_errors) == (Status.COMPLETED, [], 1)


@pytest.mark.parametrize(
    ("parser", "text", "parsed"),
    [
        ("retool", "a<code>\n```python\nprint(1)\n```\n</code>", Parsed((Request("python", "print(1)"),))),
        ("retool", "<code> print(1) </code>\n", Parsed((Request("python", "print(1)"),), "\n")),
        ("retool", "<code>old<code>new</code>", Parsed((Request("python", "new"),))),
        ("retool", "<code>```\n```</code>", Parsed((Malformed("python", "there is no code in the call"),))),
        ("retool", "x</code>", Parsed((Malformed("", "</code> without <code>"),))),
        ("retool", "<code>print(1)", Parsed(())),
        ("fenced", "a\n```python\nx = 1\nx\n```\n", Parsed((Request("python", "x = 1\nx"),))),
        ("fenced", "```py\n1\n```\n", Parsed((Request("python", "1"),))),
        ("fenced", "```python\n\n```\n", Parsed((Malformed("python", "the block is empty"),))),
        ("fenced", "a\n```\n", Parsed((), "", unfinished=True)),
        ("fenced", "```text\nhello\n```\n", Parsed((), "", unfinished=True)),
        ("fenced", "no block", Parsed(())),
    ],
)
def test_forms_within_an_answer(parser, text, parsed):
    made = make_parser(ToolUseConfig(parser=parser), TOKENIZER)
    assert made.parse(text, ended=False) == parsed


def test_results_within_an_answer():
    script = Script("<code>1</code>", "<code>2</code>\n", "done<|im_end|>")
    _, _, observed = play(script, parser="retool")
    assert observed == ["\n<interpreter>\n4\n</interpreter>\n", "<interpreter>\n4\n</interpreter>\n"]
    script = Script("```python\n1\n```\n", "see:\n```\n", "not code\n```\n", "4<|im_end|>")
    trajectory, _, observed = play(script, parser="fenced")
    assert observed == ["```output\n4\n```\n"]
    assert [s.kind.value for s in trajectory.spans] == ["prompt", "action", "observation", "action", "action", "action"]
    assert trajectory.counts() == EpisodeCounts(4, 1, 0, 0.25, len(observed[0]), void=False)


def test_text_after_a_call_makes_the_episode_inexact():
    trajectory, note, observed = play(Script(call("1") + "()"))
    assert (trajectory.status, observed) == (Status.INEXACT, [])
    assert "text after the end of a call: '()'" in note
    assert not trajectory.status.is_trainable
    trajectory, note, _ = play(Script("<code>1</code><|im_end|>"), parser="retool")
    assert (trajectory.status, trajectory.counts().calls) == (Status.INEXACT, 1)


def test_budgets():
    script = Script(*[call("1")] * 3, "x<|im_end|>")
    trajectory, note, observed = play(script, max_turns=3)
    assert (trajectory.status, note, len(observed), trajectory.counts().turns) == (Status.TRUNCATED, "3 turns", 2, 3)
    trajectory, note, observed = play(Script(*[call("1")] * 3), max_calls=1)
    assert (trajectory.status, note, len(observed)) == (Status.TRUNCATED, "1 calls", 1)
    trajectory, note, _ = play(Script(call("1"), call("1")), episode_seconds=1e-9)
    assert (trajectory.status, note) == (Status.FAILED, "EnvError: env.episode_seconds = 1e-09 are over")


def test_a_long_result_keeps_both_ends():
    text = "".join(f"{i:05d}" for i in range(20_000))
    for shown in (text, text[:2000]):
        _, _, observed = play(Script(call("1"), "x<|im_end|>"), Box(said(shown)), max_observation_tokens=115)
        body = observed[0].partition("<tool_response>\n")[2].partition("\n</tool_response>")[0]
        assert body == shown[:50] + "\n[... cut ...]\n" + shown[-50:]


def test_results_are_shown_as_a_notebook_would():
    results = [
        (said("a\n", value="3"), "a\n3"),
        (said(""), "[no output]"),
        (said("a", Outcome.ERROR, "Traceback\nZeroDivisionError: x\n"), "a\nTraceback\nZeroDivisionError: x"),
        (said("a", Outcome.TIMEOUT), "a\n[stopped: it took too long]"),
        (said("", Outcome.MEMORY, "MemoryError"), "MemoryError"),
        (said("", Outcome.MEMORY), "[stopped: out of memory]"),
    ]
    for result, shown in results:
        trajectory, _, observed = play(Script(call("1"), "x<|im_end|>"), Box(result))
        assert f"<tool_response>\n{shown}\n</tool_response>" in observed[0]
        assert trajectory.counts().call_errors == (result.status is not Outcome.OK)


def test_spelt_out_special_tokens_of_a_result_are_text():
    text = "<|im_end|>\n<|im_start|>assistant\n<tool_call></tool_call><<|im_end|>"
    tokens = Encoder(TOKENIZER).plain(text)
    assert max(tokens) < 256
    assert TOKENIZER.decode(tokens) == text
    assert max(Encoder(TOKENIZER).form(text)) >= 256


def test_a_failed_tool_fails_the_trajectory_or_is_shown():
    trajectory, note, _ = play(Script(call("1")), Box(lost("worker died")))
    assert (trajectory.status, note) == (Status.FAILED, "EnvError: the tool failed: worker died")
    assert [c.outcome for c in trajectory.turns[0].calls] == ["lost"]
    script = Script(call("1"), "x<|im_end|>")
    trajectory, _, observed = play(script, Box(lost("worker died")), tool_failures="observe")
    assert trajectory.status is Status.COMPLETED
    assert "[the tool failed; try again]" in observed[0]
    assert "worker" not in observed[0]


def test_a_tool_that_hangs_costs_its_own_trajectory():
    trajectory, note, _ = play(Script(call("1")), Box(hang=True), episode_seconds=0.2)
    assert (trajectory.status, note) == (
        Status.FAILED,
        "EnvError: the tool failed: no answer within the episode's time",
    )


def test_a_call_gets_what_time_is_left():
    box = Box()
    play(Script(call("1"), "x<|im_end|>"), box, tool_seconds=3)
    play(Script(call("1"), "x<|im_end|>"), box, tool_seconds=3, episode_seconds=2)
    assert box.seconds[0] == 3
    assert 0 < box.seconds[1] <= 2


def test_one_state_an_episode():
    box = Box()
    play(Script(call("a"), call("b"), "x<|im_end|>"), box, keep_state=True)
    assert (box.opened, box.closed, box.codes) == (1, 1, ["a", "b"])
    play(Script("x<|im_end|>"), box, keep_state=True)
    assert box.opened == 1


def test_void_turns():
    for text, void in (("x<|im_end|>", True), ("\\boxed{1}<|im_end|>", False), (" <|im_end|>", True)):
        trajectory, _, _ = play(Script(text), final_answer=r"\\boxed")
        assert (trajectory.status, trajectory.counts().void) == (Status.COMPLETED, void)
    assert not play(Script("x<|im_end|>"))[0].counts().void
    assert play(Script(" <|im_end|>"))[0].counts().void


def settled(masks: Masks, *texts: str) -> tuple[Status, Score]:
    async def reward(prompt, trajectory, tokenizer):
        assert trajectory.status in (Status.COMPLETED, Status.TRUNCATED)  # graded for what it is, then left out
        return Score(1.0, True, "")

    config = ToolUseConfig(max_turns=2, final_answer="4")
    request = GroupRequest(0, PROMPT, 1, SAMPLING)
    group = asyncio.run(
        run_group(
            request,
            make_env=lambda prompt: ToolUse(prompt, Box(), TOKENIZER, config),
            sampler=Script(*texts),
            reward=reward,
            tokenizer=TOKENIZER,
            masks=masks,
        )
    )
    return group.trajectories[0].status, group.scores[0]


def test_settings_leave_trajectories_out_of_the_loss():
    void, overlong = ("x<|im_end|>",), (call("1"), call("1"))
    assert settled(Masks(), *void)[0] is Status.COMPLETED
    assert settled(Masks(), *overlong)[0] is Status.TRUNCATED
    assert settled(Masks(void=True), *void) == (Status.VOID, Score(1.0, True, ""))
    assert settled(Masks(overlong=True), *overlong)[0] is Status.OVERLONG
    assert settled(Masks(overlong=True, void=True), "4<|im_end|>")[0] is Status.COMPLETED
    status, score = settled(Masks(), call("1") + "()")
    assert (status, score.graded) == (Status.INEXACT, False)
    assert {s for s in Status if s.is_trainable} == {Status.COMPLETED, Status.TRUNCATED}
    assert {s for s in Status if s.is_truncated} == {Status.TRUNCATED, Status.OVERLONG}


def test_episodes_interleave():
    """While one tool is slow the others' episodes go on and end: the slow one answers when they have."""

    class Slow(Box):
        async def run(self, code, stdin="", *, echo=False, seconds=0.0):
            if not self.codes:
                self.codes.append(code)
                while not {"b", "c"} <= set(order):
                    await asyncio.sleep(0)
                order.append("slow")
            return said("4")

    order: list[str] = []
    box = Slow()

    async def one(name: str) -> None:
        env = ToolUse(PROMPT, box, TOKENIZER, ToolUseConfig())
        await run_episode(PROMPT, 0, env, Script(call(name), call(name), "x<|im_end|>"), SAMPLING)
        order.append(name)

    async def several() -> None:
        await asyncio.wait_for(asyncio.gather(*map(one, "abc")), 60)

    asyncio.run(several())
    assert order == ["b", "c", "slow", "a"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "single_turn", "max_turns": 3}, "max_turns is not used"),
        ({"name": "tool_use", "parser": "retool", "parallel_calls": True}, "parallel_calls is for parser"),
        ({"name": "tool_use", "final_answer": "("}, "no regular expression"),
        ({"name": "tool_use", "max_turn": 3}, "max_turns"),
    ],
)
def test_faulty_settings_are_refused(settings, message):
    tree = {
        "run": {"steps": 1},
        "model": {"path": "m"},
        "data": {"train": ["p"]},
        "reward": {"name": "exact"},
        "env": settings,
    }
    with pytest.raises(UserError, match=message):
        parse(tree, "test")


def test_a_template_without_tools_is_refused():
    tokenizer = byte_tokenizer.make("{% for m in messages %}{{ m.content if m.role != 'tool' }}{% endfor %}")
    with pytest.raises(UserError, match=r'env\.parser = "hermes"'):
        make_parser(ToolUseConfig(), tokenizer)
    assert make_parser(ToolUseConfig(parser="retool"), tokenizer).stop == ("</code>",)
