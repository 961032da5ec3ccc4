"""Rows in the published form of ReTool's cold-start data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stare_megatron.__main__ import main
from stare_megatron.data.prepare.retool import conversation
from stare_megatron.data.prepare.types import MalformedField, RawRow

CALL = "<code>\n```python\nprint(2 ** 70)\n```\n</code>"
RESULT = "<interpreter>\n1180591620717411303424\n</interpreter>"
ANSWER = f"Let me see.\n{CALL}\n{RESULT}\nSo it is.\n<answer>\\boxed{{1}}</answer>"


def row(answer: str, question: str = "Rules ...\n*user question:*\nWhat is 2^70?\n") -> RawRow:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return RawRow("f.jsonl:1", {"messages": messages})


def test_tool_output_is_marked_and_spelt_as_in_episodes():
    made = conversation(row(ANSWER), "Be brief.")
    assert made["messages"][:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2^70?"},
    ]
    assert made["parts"] == [
        {"text": f"Let me see.\n{CALL}", "learn": True},
        {"text": "\n<interpreter>\n1180591620717411303424\n</interpreter>\n", "learn": False},
        {"text": "So it is.\n\n\\boxed{1}", "learn": True},
    ]
    assert made["messages"][2]["content"] == "".join(part["text"] for part in made["parts"])


def test_the_parser_reads_every_call():
    from stare_megatron.envs.parsers.base import Request
    from stare_megatron.envs.parsers.retool import ReTool

    for part in conversation(row(ANSWER), "s")["parts"][:1]:
        parsed = ReTool.parse(None, part["text"], ended=False)  # type: ignore[arg-type]
        assert parsed.calls == (Request("python", "print(2 ** 70)"),)
        assert parsed.trailing == ""


def test_an_answer_without_calls_is_one_part():
    assert conversation(row("\\boxed{3}"), "s")["parts"] == [{"text": "\\boxed{3}", "learn": True}]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row("<code>1</code>"), "do not pair"),
        (row("<code>1</code> and <interpreter>1</interpreter>"), "text between"),
        (row("<interpreter>1</interpreter>"), "do not pair"),
        (row(ANSWER, "What is 2^70?"), "no problem after"),
        (RawRow("f:1", {"messages": [{"role": "user", "content": "x"}]}), "two messages"),
        (RawRow("f:1", {}), "two messages"),
        (RawRow("f:1", {"messages": [{"role": "assistant", "content": "x"}] * 2}), "role 'user'"),
    ],
)
def test_other_rows_are_malformed(broken, message):
    with pytest.raises(MalformedField, match=message):
        conversation(broken, "s")


def prepare(file: Path, out: Path, *more: str) -> int:
    words = ["--file", str(file), "--form", "chat", "--system", "Be brief.", "--out", str(out)]
    return main(["prepare-data", "retool-sft", *words, *more])


def test_rows_are_reported_and_all_or_nothing_is_written(tmp_path, capsys):
    file, out = tmp_path / "sft.jsonl", tmp_path / "out.jsonl"
    rows = [row(ANSWER).fields, row("<code>1</code>").fields]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert prepare(file, out) == 2
    said = capsys.readouterr().err
    assert "sft.jsonl:2: field 'messages': tags" in said
    assert "1 of 2 rows are malformed" in said
    assert not out.exists()
    assert prepare(file, out, "--skip-malformed") == 0
    (line,) = out.read_text().splitlines()
    assert json.loads(line) == conversation(row(ANSWER), "Be brief.")
    assert "1 of 2 rows; left out: 1 malformed" in capsys.readouterr().out
    (broken,) = (tmp_path / "out.jsonl.malformed.jsonl").read_text().splitlines()
    assert json.loads(broken)["place"].endswith("sft.jsonl:2")
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["dataset"] == "retool-sft"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--system", ""], "give --form chat, and with --system the system message"),
        (["--form", "text"], "give --form chat"),
        (["--against", "p.jsonl"], "--against is for prompts"),
        (["--instruction", "Box it."], "--instruction is for prompts"),
    ],
)
def test_options_of_prompts_are_refused(tmp_path, capsys, words, says):
    (tmp_path / "sft.jsonl").write_text(json.dumps(row(ANSWER).fields))
    assert prepare(tmp_path / "sft.jsonl", tmp_path / "out.jsonl", *words) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_without_rows_is_refused(tmp_path, capsys):
    (tmp_path / "sft.jsonl").write_text("")
    assert prepare(tmp_path / "sft.jsonl", tmp_path / "out.jsonl") == 2
    assert "sft.jsonl" in capsys.readouterr().err
