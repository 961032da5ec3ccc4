import json
import shutil
import subprocess
import tomllib
from collections import namedtuple

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from stare_megatron import config
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.run import folder as run_folder
from tests.configs import configuration

MODEL = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 112,
    "max_position_embeddings": 64,
}


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture
def make(tmp_path, model):
    def build(**run):
        run = {"dir": str(tmp_path / "runs"), "steps": 3, "seed": 5, **run}
        return configuration(run=run, model={"path": str(model)}, trainer={"megatron": {"softmax_scale": 0.5}})

    return build


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_new_folder_holds_the_configuration_and_the_record(make, tmp_path):
    folder = run_folder.open_run(make(), ["stare-megatron", "train", "x.toml"])
    assert folder.fresh
    assert folder.path == tmp_path / "runs" / "unit"
    assert names(tmp_path / "runs") == ["unit"]
    assert config.load(folder.config, []) == make()
    (start,) = json.loads(folder.record.read_text())["starts"]
    assert start["command"] == ["stare-megatron", "train", "x.toml"]
    assert start["seed"] == 5
    assert start["packages"]["ray"]
    assert "CPUs" in start["hardware"]
    assert start["parameters"] == run_folder.parameter_count(make().model.path)


def test_record_does_not_name_the_machine(make):
    import socket

    name = socket.gethostname()
    record = json.loads(run_folder.open_run(make(), []).record.read_text())["starts"][0]
    assert name not in record["hardware"].split()
    assert set(record) == {
        "time",
        "command",
        "seed",
        "python",
        "packages",
        "commit",
        "dirty",
        "hardware",
        "sandbox",
        "code",
        "parameters",
    }


def test_to_toml_round_trips_every_key(make):
    tree = tomllib.loads(run_folder.to_toml(make()))
    assert config.parse(tree, "again") == make()
    assert tree["trainer"]["megatron"] == {"softmax_scale": 0.5}


def test_a_run_with_steps_is_refused_with_the_cure(make):
    folder = run_folder.open_run(make(), [])
    folder.metrics.write_text('{"step": 1}\n')
    over = r"run\.name = 'unit' has already run; it saved no checkpoint: start it over with run\.resume=auto, or choose"
    with pytest.raises(UserError, match=over):
        run_folder.open_run(make(), [])
    assert folder.metrics.read_text() == '{"step": 1}\n'


def test_a_run_with_a_checkpoint_is_refused(make):
    folder = run_folder.open_run(make(), [])
    (folder.checkpoints / "step_000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has already run; continue it with run\.resume=auto, or choose another"):
        run_folder.open_run(make(), [])


def test_auto_continues_and_keeps_both_starts(make):
    first = run_folder.open_run(make(), ["first"])
    first.metrics.write_text('{"step": 1}\n')
    second = run_folder.open_run(make(resume="auto", steps=9), ["second"])
    assert not second.fresh
    assert second.metrics.read_text() == '{"step": 1}\n'
    assert [s["command"] for s in json.loads(second.record.read_text())["starts"]] == [["first"], ["second"]]
    assert config.load(second.config, []).run.steps == 9
    assert config.load(second.path / "config.1.toml", []).run.steps == 3


def test_auto_without_a_folder_starts_anew(make):
    assert run_folder.open_run(make(resume="auto"), []).fresh


def test_a_failed_start_is_replaced(make):
    first = run_folder.open_run(make(), ["first"])
    first.logs.mkdir()
    second = run_folder.open_run(make(), ["second"])
    assert second.fresh
    assert not second.logs.exists()
    assert [s["command"] for s in json.loads(second.record.read_text())["starts"]] == [["second"]]


def test_resuming_from_another_run_does_not_touch_this_one(make, tmp_path):
    folder = run_folder.open_run(make(), [])
    folder.metrics.write_text('{"step": 1}\n')
    other = tmp_path / "runs" / "other" / "checkpoints" / "step_000002"
    with pytest.raises(UserError, match=r"holds another run than run\.resume = .*choose another run\.name"):
        run_folder.open_run(make(resume=str(other)), [])
    assert not run_folder.open_run(make(resume=str(folder.checkpoints / "step_000001")), []).fresh


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_foreign_folder_is_left_alone(make, tmp_path, resume):
    mine = tmp_path / "runs" / "unit" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    with pytest.raises(UserError, match="is not the folder of a run; choose another"):
        run_folder.open_run(make(resume=resume), [])
    assert mine.read_text() == "x"


def test_nothing_half_made_remains(make, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "_write_record", fail)
    with pytest.raises(UserError, match=r"run\.dir = .*cannot write the run folder .*No space left"):
        run_folder.open_run(make(), [])
    assert names(tmp_path / "runs") == []


def test_unwritable_place_names_the_key(make, tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"run\.dir = .*cannot write the run folder"):
        run_folder.open_run(make(), [])


def test_full_disk_is_found_first(make, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 300 * 2**20))
    with pytest.raises(UserError, match=r"run\.dir = .*300 MB free on its disk, the run needs 500 MB .*free some"):
        run_folder.open_run(make(min_free_mb=500), [])
    assert not (tmp_path / "runs").exists()
    run_folder.open_run(make(), [])


def test_disk_need_grows_with_the_model_and_the_checkpoints_kept(make, monkeypatch):
    monkeypatch.setattr(run_folder, "parameter_count", lambda _: 100 * 2**20)
    config = make(steps=100)

    def need(**checkpoint: object) -> int:
        changed = config.checkpoint.model_copy(update=checkpoint)
        return run_folder.disk_need_mb(config.model_copy(update={"checkpoint": changed})) - 256

    # Bytes a parameter: 16 in a checkpoint, 2 in an exported policy of bfloat16.
    assert need() == need(every=10)
    assert need(every=0) == 100 * (2 * 16 + 2)  # that of the end, and room for the next
    assert need(every=10) == 100 * (3 * 16 + 2)
    assert need(every=10, keep_last=50) == 100 * (11 * 16 + 2)
    assert need(every=10, keep_every=50) == 100 * (5 * 16 + 2)  # steps 50 and 100 stay
    assert need(every=10, best_metric="eval/avg") == 100 * (4 * 16 + 2)
    assert need(every=10, export_every=20, export_final=False) == 100 * (3 * 16 + 5 * 2)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_from_the_configuration(model, tied):
    fields = MODEL | {"tie_word_embeddings": tied}
    (model / "config.json").write_text(json.dumps(fields))
    twin = Qwen2ForCausalLM(
        Qwen2Config(**{k: v for k, v in fields.items() if k not in ("architectures", "model_type")})
    )
    assert run_folder.parameter_count(model) == sum(p.numel() for p in twin.parameters())


def test_discard_removes_only_an_unused_fresh_folder(make):
    used = run_folder.open_run(make(name="used"), [])
    used.metrics.write_text('{"step": 1}\n')
    run_folder.discard(used)
    assert used.path.exists()
    continued = run_folder.open_run(make(name="used", resume="auto"), [])
    continued.metrics.unlink()
    run_folder.discard(continued)
    assert continued.path.exists()
    unused = run_folder.open_run(make(name="unused"), [])
    run_folder.discard(unused)
    assert not unused.path.exists()


def test_git_state_of_a_checkout_and_outside_one(tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    (repo / "a").write_text("1")
    for args in (["init", "-q"], ["add", "a"], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(repo), *args], check=True)
    commit, dirty = run_folder.git_state(repo)
    assert len(commit) == 40
    assert not dirty
    (repo / "a").write_text("2")
    assert run_folder.git_state(repo) == (commit, True)
    assert run_folder.git_state(tmp_path) == ("", False)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """A driver's nvidia-smi that reports two GPUs."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    monkeypatch.delenv("STARE_DEVICE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device.gpu_names.cache_clear()
    yield
    device.gpu_names.cache_clear()


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("0", 1), ("", 0), ("-1", 0)])
def test_gpu_names_honour_the_visible_ones(gpus, monkeypatch, visible, count):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.gpu_names() == ("NVIDIA H100",) * count


def test_hardware_line_counts_equal_gpus(gpus):
    assert run_folder.hardware().endswith("2 x NVIDIA H100")


def test_forced_cpu_has_no_gpus(gpus, monkeypatch):
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    assert device.gpu_names() == ()
