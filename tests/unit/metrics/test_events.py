import datetime
import json

from stare_megatron.metrics.events import FILE, Events, change
from stare_megatron.types.report import RunEvent


def test_events_are_on_record_and_news_on_the_screen(tmp_path):
    said: list[str] = []
    tell = Events(tmp_path, said.append)
    tell(RunEvent("engine 0", "b (10.0.0.2)", "STALE", "HEALTHY", "it holds version 0", news=False))
    tell(RunEvent("engine 1", "b (10.0.0.2)", "HEALTHY", "DEAD", "its process died"))
    Events(tmp_path, said.append)(RunEvent("trainer ranks", "", "DEAD", "RESTARTING", "1 restarts are left"))
    assert said == [
        "engine 1 on b (10.0.0.2): HEALTHY -> DEAD: its process died",
        "trainer ranks: DEAD -> RESTARTING: 1 restarts are left",
    ]
    tell.happened("run", "ENDED", "3 of 3 steps are done")
    tell.noted("run", "STOPPING")("stopping after this step")
    assert said[2:] == ["stopping after this step"]
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["new"] for row in rows] == ["HEALTHY", "DEAD", "RESTARTING", "ENDED", "STOPPING"]
    assert [row["old"] for row in rows] == ["STALE", "HEALTHY", "DEAD", "", ""]
    assert [change(row["old"], row["new"]) for row in rows[2:4]] == ["DEAD -> RESTARTING", "ENDED"]
    assert set(rows[1]) == {"time", "who", "node", "old", "new", "reason"}
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(rows[1]["time"])
    assert abs(age.total_seconds()) < 60
