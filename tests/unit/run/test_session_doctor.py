"""What a session looks at before it takes a device."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from stare_megatron import doctor
from stare_megatron.cluster import placement, runtime
from stare_megatron.errors import UserError
from stare_megatron.run import folder as run_folder
from stare_megatron.run import sizing
from stare_megatron.run.session import open_session
from tests.configs import configuration


@pytest.mark.parametrize("trainers", [True, False], ids=["training", "evaluation"])
def test_an_unfit_cluster_is_refused_before_anything_is_placed(monkeypatch, tmp_path, trainers):
    shared: list[Path | None] = []

    def short(config, folder):
        shared.append(folder)
        raise UserError("node2: not fit")

    monkeypatch.setattr(runtime, "cluster", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(placement, "plan", lambda *_, **__: pytest.fail("placed"))
    monkeypatch.setattr(doctor, "short", short)
    monkeypatch.setattr(run_folder, "parameter_count", lambda _: 0)
    with (
        pytest.raises(UserError, match="node2: not fit"),
        open_session(configuration(), tmp_path, lambda _: None, sizing.Load(1, 1), trainers=trainers),
    ):
        pytest.fail("opened")
    # An evaluation writes no checkpoint.
    assert shared == [tmp_path if trainers else None]
