"""The runner of tools/gpu_check.py: whatever a part does, it has a result and hides no other's."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tools import gpu_check
from tools.gpu_check_parts import outcome, parts, report, runner
from tools.gpu_check_parts.outcome import Outcome, Status
from tools.gpu_check_parts.parts import Part

ANSWER = json.dumps({"status": "ok", "reason": "", "numbers": {"x": 1.5}})


def run(code: str, folder: Path, seconds: float = 30.0) -> runner.Result:
    command = [sys.executable, "-c", code, str(folder)]
    return runner.run("part", command, folder, seconds, os.environ, folder, threading.Event())


def writes(text: str, then: str = "") -> str:
    return f"import sys; open(sys.argv[1] + '/outcome.json', 'w').write({text!r})\n{then}"


def test_a_part_that_answers(tmp_path):
    result = run(writes(ANSWER, "print('said')"), tmp_path)
    assert (result.status, result.reason, result.numbers) == (Status.OK, "", {"x": 1.5})
    assert Path(result.log).read_text() == "said\n"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ValueError('the cause')", ("ended with code 1", "ValueError: the cause")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", ("ended by signal SIGSEGV",)),
        ("print('nothing more')", ("ended without an outcome", "nothing more")),
        (writes("{"), ("cannot be read",)),
        (writes("[]"), ("cannot be read",)),
        (writes(json.dumps({"status": "splendid", "reason": "", "numbers": {}})), ("cannot be read",)),
        (writes(json.dumps({"status": "ok", "reason": None, "numbers": 3})), ("cannot be read",)),
        (writes(ANSWER, "raise SystemExit(7)"), ("ended with code 7",)),
    ],
)
def test_a_part_that_fails(tmp_path, code, says):
    result = run(code, tmp_path)
    assert result.status is Status.FAILED
    for words in says:
        assert words in result.reason


def test_an_answer_of_an_earlier_run_does_not_count(tmp_path):
    (tmp_path / "outcome.json").write_text(ANSWER)
    assert run("raise SystemExit(0)", tmp_path).status is Status.FAILED


@pytest.mark.parts
def test_a_part_that_hangs_ends_with_all_it_started(tmp_path, monkeypatch):
    """Also a grandchild in a session of its own whose parent has ended, and one that ignores the request."""
    monkeypatch.setattr(runner, "GRACE_S", 1.0)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(99)"
    )
    middle = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)\n"
        "open(sys.argv[1] + '/pid', 'w').write(str(p.pid)); time.sleep(1)"
    )
    code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {middle!r}, sys.argv[1]]).wait()\n"
        "print('waits', flush=True); time.sleep(99)"
    )
    began = time.monotonic()
    result = run(code, tmp_path, seconds=8.0)
    assert result.status is Status.TIMED_OUT
    assert "not done after 8 s" in result.reason
    assert "waits" in result.reason
    assert time.monotonic() - began < 90  # and not after the 99 s that they sleep
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parts
def test_a_part_may_clean_up_when_time_is_up(tmp_path):
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    open(sys.argv[1] + '/clean', 'w').close(); raise SystemExit(1)\n"
        "signal.signal(signal.SIGTERM, end); time.sleep(99)"
    )
    assert run(code, tmp_path, seconds=5.0).status is Status.TIMED_OUT
    assert (tmp_path / "clean").exists()


def test_garbage_is_shown_as_text(tmp_path):
    garbage = b"\x1b[31mred\x1b[0m\xff\x00\x07 " + b"y" * 5000 + b"\n\n"
    code = f"import sys; sys.stdout.buffer.write({garbage!r}); sys.exit(3)"
    reason = run(code, tmp_path).reason
    (line,) = [part for part in reason.split("\n") if part.startswith("|")]
    assert line.isprintable()
    assert len(line) <= 302
    json.dumps(reason).encode()


def test_outcomes():
    seen = Outcome()
    seen.near("a", 1.0, 1.1, 0.2)
    assert seen.status is Status.OK
    seen.near("b", 2.0, 4.0, 0.4, relative=True)
    seen.near("c", float("nan"), 0.0, 1.0)
    assert seen.status is Status.FAILED
    assert seen.reason == "b: 2 for 4, 0.5 > 0.4; c: nan for 0, nan > 1"
    assert outcome.parse(Outcome(numbers={"x": [1]}).to_json()).numbers == {"x": [1]}


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **codes: str) -> None:
    """Parts that are lines of Python of a module that `child` imports."""
    module = tmp_path / "pretended.py"
    head = "import os, signal, sys, time\nfrom tools.gpu_check_parts.outcome import *\n"
    module.write_text(head + "".join(f"def {name}(context):\n    {code}\n" for name, code in codes.items()))
    made = {name: Part(name, f"pretended:{name}", 30.0, f"what {name} does") for name in codes}
    monkeypatch.setattr(gpu_check, "PARTS", made)
    site = tmp_path / "site"
    site.mkdir()
    # `child` reads the table in a process of its own.
    (site / "sitecustomize.py").write_text(
        "import dataclasses\nfrom tools.gpu_check_parts import parts\n"
        f"parts.PARTS.clear()\nfor name in {list(codes)!r}:\n"
        "    parts.PARTS[name] = parts.Part(name, 'pretended:' + name, 30.0, '')\n"
    )
    path = os.pathsep.join([str(site), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


@pytest.mark.parts
def test_every_part_is_reported(tmp_path, monkeypatch, capsys):
    pretend(
        monkeypatch,
        tmp_path,
        good="return Outcome(numbers={'rate': 1.25, 'of': {'a': 3}})",
        dies="os.kill(os.getpid(), signal.SIGABRT)",
        absent="return skipped('not here')",
        also_good="(context.folder / 'seen').write_text(context.device); return Outcome()",
    )
    out = tmp_path / "out"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    found = json.loads((out / report.JSON).read_text())
    statuses = {p["part"]: p["status"] for p in found["parts"]}
    assert statuses == {"good": "ok", "dies": "failed", "absent": "skipped", "also_good": "ok"}
    assert "SIGABRT" in found["parts"][1]["reason"]
    assert (found["parts"][0]["numbers"], found["parts"][2]["reason"]) == ({"rate": 1.25, "of": {"a": 3}}, "not here")
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["packages"]["torch"]
    assert found["not checked"] == parts.NOT_CHECKED
    assert (out / "parts/also_good/seen").read_text() == "cpu"
    text = (out / report.TEXT).read_text()
    assert "of: a 3" in text
    assert text in capsys.readouterr().out
    assert gpu_check.main(["--device", "cpu", "--parts", "also_good,absent", "--out", str(out)]) == 0


def test_the_report_is_there_while_a_later_part_runs(tmp_path, monkeypatch):
    out = tmp_path / "out"
    pretend(
        monkeypatch,
        tmp_path,
        first="return Outcome()",
        second=f"return Outcome(reason=open({str(out / report.JSON)!r}).read())",
    )
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 0
    _, second = json.loads((out / report.JSON).read_text())["parts"]
    assert [p["part"] for p in json.loads(second["reason"])["parts"]] == ["first"]


def test_parts_beside_each_other(tmp_path, monkeypatch):
    """Each waits for what the other does, and knows that it is not alone; the report has them in their order."""
    wait = "[time.sleep(0.05) for _ in iter(lambda: (context.shared / {!r}).exists(), True)]"
    body = "(context.shared / {!r}).touch(); {}; return Outcome(numbers={{'beside': context.beside}})"
    codes = {name: body.format(name, wait.format(other)) for name, other in (("one", "two"), ("two", "one"))}
    pretend(monkeypatch, tmp_path, **codes)
    out = tmp_path / "out"
    assert gpu_check.main(["--device", "cpu", "--together", "2", "--out", str(out)]) == 0
    found = json.loads((out / report.JSON).read_text())["parts"]
    assert [(p["part"], p["numbers"]) for p in found] == [("one", {"beside": True}), ("two", {"beside": True})]


@pytest.mark.parts
def test_time_runs_out(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, slow="time.sleep(99)", never="return Outcome()")
    monkeypatch.setattr(gpu_check, "_LEAST_S", 2.0)
    monkeypatch.setattr(runner, "GRACE_S", 1.0)
    out = tmp_path / "out"
    assert gpu_check.main(["--device", "cpu", "--minutes", "0.1", "--out", str(out)]) == 1
    slow, never = json.loads((out / report.JSON).read_text())["parts"]
    assert (slow["status"], never["status"]) == ("timed out", "skipped")
    assert "no time left" in never["reason"]


@pytest.mark.parts
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_request_to_end_ends_what_runs(tmp_path, monkeypatch, number):
    before = signal.getsignal(signal.SIGTERM)
    child = "import time; time.sleep(99)"
    ends = (
        "import subprocess; child = subprocess.Popen([sys.executable, '-c', {!r}], start_new_session=True); "
        "(context.folder / 'pid').write_text(str(child.pid)); os.kill(os.getppid(), signal.{}); time.sleep(99)"
    )
    pretend(monkeypatch, tmp_path, good="return Outcome()", ends=ends.format(child, number), never="return Outcome()")
    out = tmp_path / "out"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    found = {
        p["part"]: (p["status"], p["reason"].split("\n")[0])
        for p in json.loads((out / report.JSON).read_text())["parts"]
    }
    assert found == {"good": ("ok", ""), "ends": ("failed", runner.STOPPED), "never": ("skipped", runner.STOPPED)}
    pid = int((out / "parts/ends/pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("words", [["--parts", "kernels,typo"], ["--out", "."], ["--together", "0"]])
def test_arguments_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--device", "cpu", *words])
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_every_part_can_be_found(capsys):
    for part in parts.PARTS.values():
        module, _, function = part.where.partition(":")
        file = gpu_check.ROOT / f"{module.replace('.', '/')}.py"
        assert f"def {function}(context: Context) -> Outcome:" in file.read_text(), part
    assert gpu_check.main(["--list"]) == 0
    assert "offload" in capsys.readouterr().out


def test_signals_have_names():
    assert runner._signal(signal.SIGKILL) == "SIGKILL"
    assert runner._signal(63) == "63"
