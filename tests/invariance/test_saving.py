"""Saving on ranks: nothing is lost between layouts, in the background, before the first step, or by a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import launch
from rich.console import Console
from step_cases import make_checkpoint

from stare_megatron import checkpoint
from stare_megatron.convert.inspection import McoreTensors, differences
from stare_megatron.convert.run import Options, convert
from stare_megatron.convert.torch_dist import TorchDist


def layout(ranks: int, **settings: Any) -> dict[str, Any]:
    return {"trainer": {"micro_batch_tokens": 64, "optimizer": {"lr": 1e-3}, "world_size": ranks} | settings}


TP2_DP2 = layout(4, tensor_parallel=2)
PP2 = layout(2, pipeline_parallel=2)
TP2 = layout(2, tensor_parallel=2)
DP2 = layout(2)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen2")


def same(one: Path, other: Path) -> bool:
    """Whether two distributed checkpoints hold the same tensors, the optimizer's included, bit for bit."""
    a, b = (McoreTensors(TorchDist(folder), optimizer=True) for folder in (one, other))
    moments = [name for name in a.infos if "exp_avg" in name]
    assert moments
    return list(differences(a, b)) == []


def test_there_and_back_at_another_layout(model, tmp_path):
    """TP2 x PP1 x DP2 to TP1 x PP2 x DP1 and back: weights and optimizer state bit for bit, and the same next step."""

    def at(ranks: int, shape: dict[str, Any], source: Path | None, out: Path) -> Any:
        arguments = {"checkpoint": model, "layout": shape, "source": source, "out": out}
        found = launch("saving_cases:reshard", ranks, arguments)
        files = [name for _, names in found for name in names]
        assert sorted(files) == sorted(p.name for p in out.glob("*.distcp"))
        return found[0][0]

    there, other, back = (tmp_path / name for name in ("there", "other", "back"))
    first = at(4, TP2_DP2, None, there)
    second = at(2, PP2, there, other)
    third = at(4, TP2_DP2, other, back)
    assert same(there, other)
    assert same(there, back)
    for stats in (second, third):
        assert stats["update/loss"] == pytest.approx(first["update/loss"], abs=1e-6)
        assert stats["update/grad_norm"] == pytest.approx(first["update/grad_norm"], rel=1e-5)
    assert third == first


@pytest.mark.parametrize("shape", [TP2, DP2], ids=["TP2", "DP2"])
def test_saved_before_the_first_step(model, tmp_path, shape):
    arguments = {"checkpoint": model, "layout": shape, "out": tmp_path / "saved"}
    for found in launch("saving_cases:unstarted", 2, arguments):
        assert found[:2] == found[2:]


@pytest.mark.parametrize("shape", [TP2, DP2], ids=["TP2", "DP2"])
def test_a_save_in_the_background_is_of_the_state_when_it_began(model, tmp_path, shape):
    arguments = {"checkpoint": model, "layout": shape, "folder": tmp_path}
    said = launch("saving_cases:in_background", 2, arguments)
    assert said == [([False, True] * 3, True)] * 2
    assert all(same(tmp_path / f"at_once-{n}", tmp_path / f"later-{n}") for n in range(3))


def test_every_rank_hears_of_a_file_that_cannot_be_written(model, tmp_path):
    arguments = {"checkpoint": model, "layout": TP2, "folder": tmp_path / "saved"}
    said = launch("saving_cases:unwritable", 2, arguments)
    assert all("the checkpoint could not be written" in text for text in said), said
    assert "No space left on device" in said[1]


def test_saved_to_disks_of_ranks_own_and_copied(model, tmp_path):
    """From links the state comes back bit for bit, and copies are the files of a save without links; a file that some
    rank lacks is refused on every rank, which can load another checkpoint then."""
    arguments = {"checkpoint": model, "layout": TP2_DP2, "folder": tmp_path}
    for found in launch("saving_cases:on_own_disks", 4, arguments):
        went_on, restored, refused, instead = found
        assert restored == went_on
        assert instead == went_on
        assert f"{tmp_path / 'linked/trainer'}: rank " in refused
        assert "has no __1_0.distcp" in refused
    linked, copied, durable = (tmp_path / f"{name}/trainer" for name in ("linked", "copied", "durable"))
    files = sorted(path.name for path in durable.glob("*.distcp"))
    assert len(files) >= 4
    assert sorted(path.name for path in copied.iterdir()) == files
    assert all((copied / name).read_bytes() == (durable / name).read_bytes() for name in files)
    assert all((linked / name).is_symlink() for name in files)


@pytest.mark.parametrize("local", [False, True], ids=["shared", "local"])
@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_last_checkpoint_loadable(model, tmp_path, kills, local):
    """Kills at random moments: each process finds a checkpoint that loads, never older than the one before did."""
    root = tmp_path / "checkpoints"
    disk = tmp_path / "disk/run" if local else None
    arguments = {"checkpoint": model, "root": root, "kills": kills, "seed": 5, "local": disk}
    (found,) = launch("saving_cases:killed", 1, arguments)
    loaded = [step for step, _ in found]
    assert len(loaded) == kills + 1
    assert loaded == sorted(loaded)
    assert loaded[-1] > 0
    assert sum(under_way for _, under_way in found) >= kills // 2, "the kills came between saves: they tested little"
    newest = checkpoint.find(root, "auto")
    assert newest is not None
    checkpoint.verify(newest, contents=True)


def test_a_checkpoint_loads_with_and_without_transformer_engines_extra_states(model, tmp_path):
    converted = tmp_path / "converted"
    convert(Options(model, converted), Console(quiet=True))
    assert any("final_layernorm._extra_state" in key for key in TorchDist(converted).objects)  # for others' loaders
    arguments = {"checkpoint": model, "converted": converted, "folder": tmp_path}
    (found,) = launch("saving_cases:across_specs", 1, arguments)
    assert all(stats == found[0] for stats in found), found
    keys = {name: TorchDist(tmp_path / name).objects for name in ("local", "engine", "older")}
    assert not any("_extra_state" in key for name in ("local", "engine") for key in keys[name])
    assert any("final_layernorm._extra_state" in key for key in keys["older"])
    assert same(tmp_path / "local", tmp_path / "back")
