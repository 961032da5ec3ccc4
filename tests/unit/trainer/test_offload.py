"""Moving storages between a device and one host allocation, on tensors alone. With a rank: tests/invariance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import stare_megatron_patches
from stare_megatron.errors import RunError
from stare_megatron.host import copies

stare_megatron_patches.apply("megatron-core")

from stare_megatron.trainer import offload as module  # noqa: E402
from stare_megatron.trainer.offload import Offload  # noqa: E402
from stare_megatron.trainer.residue import largest  # noqa: E402

CPU = torch.device("cpu")
MIB = 1 << 20


class Chunk:
    """Two parameters in one buffer, one of its own and one without; the buffer's gradients."""

    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        self.param = torch.randn(2 * size)
        self.own = torch.randn(5)
        buffer = SimpleNamespace(grad_data=torch.randn(2 * size), param_data=self.param)
        self.buffers, self.expert_parallel_buffers = [buffer], []
        self.first, self.second = self.param[:size].view(-1, 2), self.param[size:]
        self.module = SimpleNamespace(parameters=lambda: iter([self.first, self.second, self.own]))
        self.float8 = SimpleNamespace(_fp8_workspaces={})

    def modules(self) -> Any:
        return iter([self.module, self.float8])


def made(size: int = 100, moved: Any = ("gradients", "optimizer", "parameters"), residue: int = 0) -> Any:
    """A chunk, its optimizer's tensors (one of which is a parameter's shard) and what moves them."""
    chunk = Chunk(size)
    master, moments = torch.randn(size), [torch.randn(size), torch.randn(3), torch.tensor(7.0)]
    inner = SimpleNamespace(
        param_groups=[{"params": [master, chunk.second[3:9]]}], state={master: dict(zip("abc", moments, strict=True))}
    )
    optimizer = SimpleNamespace(optimizer=inner)
    return SimpleNamespace(
        chunk=chunk,
        master=master,
        moments=moments,
        inner=inner,
        offload=Offload([chunk], optimizer, moved, CPU, residue),  # type: ignore[arg-type, list-item]
    )


def sizes(x: Any) -> list[int]:
    tensors = (x.chunk.param, x.chunk.own, x.chunk.buffers[0].grad_data, x.master, *x.moments)
    return [t.untyped_storage().nbytes() for t in tensors]


@pytest.mark.parametrize("size", [100, MIB, 9 * MIB + 2])
def test_there_and_back_every_view_sees_the_same_bits(size):
    x = made(size)
    before = [t.clone() for t in (x.chunk.first, x.chunk.second, x.chunk.own, x.master, *x.moments)]
    whole = sizes(x)
    x.offload.put_away("parameters", "optimizer", "gradients")
    assert sizes(x) == [0, 0, 0, 0, 0, 0, 4]  # the count of steps stays
    assert x.offload.away == ("parameters", "gradients", "optimizer")
    x.offload.put_away("parameters")  # away already
    x.offload._arena_B[-1] ^= 0  # the arena is ordinary memory
    assert x.offload.bring("optimizer", "gradients") == ("gradients", "optimizer")
    assert x.offload.bring("parameters", "optimizer") == ("parameters",)
    assert sizes(x) == whole
    after = (x.chunk.first, x.chunk.second, x.chunk.own, x.master, *x.moments)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not x.chunk.buffers[0].grad_data.any()
    x.chunk.param[0] = 5.0
    assert x.chunk.first[0, 0] == 5.0


def test_copies_in_float8_go_with_the_parameters_they_are_of():
    for moved, left in (("parameters", {}), ("optimizer", {"weight": 1})):
        x = made(moved=[moved])
        x.chunk.float8._fp8_workspaces["weight"] = 1
        x.offload.put_away("parameters", "optimizer")
        assert x.chunk.float8._fp8_workspaces == left


def test_only_what_is_named_moves_and_what_was_away_is_away_again():
    x = made(moved=["optimizer"])
    x.offload.put_away("parameters", "optimizer", "gradients")
    assert x.offload.away == ("optimizer",)
    with x.offload.present("parameters", "optimizer"):
        assert x.offload.away == ()
        with x.offload.present("optimizer"):
            pass
        assert x.offload.away == ()
    assert x.offload.away == ("optimizer",)
    with pytest.raises(KeyError), x.offload.present("optimizer"):
        raise KeyError
    assert x.offload.away == ("optimizer",)


def test_nothing_moves_where_nothing_is_named():
    x = made(moved=())
    x.offload.clear()
    assert not x.offload.moves
    assert x.offload.away == ()
    assert x.offload._arena_B.numel() == 0


def test_state_that_was_replaced_meanwhile_moves_in_its_place():
    x = made()
    x.inner.state[x.master]["a"] = new = torch.randn(100)
    kept = new.clone()
    x.offload.put_away("optimizer")
    assert new.untyped_storage().nbytes() == 0
    x.offload.bring("optimizer")
    assert torch.equal(new, kept)
    x.inner.state[x.master]["d"] = torch.randn(1000)
    with pytest.raises(RuntimeError, match=r"optimizer: .* bytes do not fit the arena's"):
        x.offload.put_away("optimizer")
    assert x.offload.away == ()


def test_memory_that_numpy_saw_is_overwritten_where_it_cannot_be_freed():
    x = made()
    kept = x.chunk.param.clone()
    x.chunk.first.numpy()
    assert not x.chunk.param.untyped_storage().resizable()
    x.offload.put_away("parameters")
    assert x.chunk.param.isnan().all()
    x.offload.bring("parameters")
    assert torch.equal(x.chunk.param, kept)


def runs(*sizes: int) -> list[int]:
    """How many storages are copied at once."""
    offsets, _ = module._places(sizes)
    items = [module._Away(torch.empty(0).untyped_storage(), *x) for x in zip(sizes, offsets, strict=True)]
    return [len(run) for run in module._runs(items)]


def test_small_storages_are_copied_together():
    small, large = module._SMALL // 4, module._SMALL
    assert runs(small, small, large, small, small, 3 * large) == [2, 1, 2, 1]
    assert runs(*[small] * 200) == [128, 72]
    assert runs() == []
    assert module._places([1, 1, large, 3]) == ([0, 1, 512, large + 512], large + 1024)


@pytest.mark.parametrize(("size", "expected"), [(1, [[0], [1]]), (811, [[0], [1]]), (1 << 20, [[0, 1]])])
def test_bundles_of_state_come_and_go(size, expected):
    x = made()
    params = x.inner.param_groups[0]["params"]
    x.inner.state = {params[0]: {"m": torch.randn(100), "step": torch.tensor(1.0)}, params[1]: {"m": torch.randn(6)}}
    kept = [x.master, *(state["m"] for state in x.inner.state.values())]
    before = [t.clone() for t in kept]
    x.offload.put_away("optimizer")
    seen = []
    for here in x.offload.bundles(params, x.inner.state, size):
        there = [t.untyped_storage().nbytes() > 0 for t in kept]
        assert there == [0 in here, 0 in here, 1 in here]
        for t, comes in zip(kept, there, strict=True):
            if comes:
                t += 1
        seen.append(here)
    assert seen == expected
    assert x.offload.away == ("optimizer",)
    assert [t.untyped_storage().nbytes() for t in kept] == [0, 0, 0]
    x.offload.bring("optimizer")
    assert all(torch.equal(a, b + 1) for a, b in zip(kept, before, strict=True))


def test_sizes_and_seconds():
    x = made()
    want = {"parameters": 820, "gradients": 800, "optimizer": 812}
    assert x.offload.sizes() == want
    x.offload.put_away("optimizer", "gradients")
    assert x.offload.sizes() == want
    found = {part.name: part.total for part in x.offload.measured()}
    assert found["memory/trainer_optimizer"] == 812 / MIB
    assert found["memory/trainer_resident"] == 820 / MIB
    assert found["memory/trainer_arena"] == (1024 + 1024) / MIB
    assert found["time/offload"] > 0 == found["time/onload"]
    x.offload.bring("optimizer")
    found = {part.name: part.total for part in x.offload.measured()}
    assert found["time/onload"] > 0 == found["time/offload"]


def test_a_device_without_room_keeps_nothing_of_what_did_not_fit(monkeypatch):
    x = made()
    x.offload.put_away("parameters", "optimizer")
    second = x.offload._away["optimizer"][1]

    def full(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    storage = SimpleNamespace(resize_=lambda size: full(size) if size else None, resizable=lambda: True)
    away = x.offload._away["optimizer"]
    monkeypatch.setitem(x.offload._away, "optimizer", [away[0], module._Away(storage, second.size, second.offset)])  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"no room on the GPU for a trainer rank's optimizer, .*gpu_memory_utilization"):
        x.offload.bring("parameters", "optimizer")
    assert x.offload.away == ("optimizer",)
    assert away[0].storage.nbytes() == 0
    monkeypatch.undo()
    x.offload.bring("optimizer")
    assert x.offload.away == ()


def test_what_is_left_is_named(monkeypatch):
    x = made(moved=["optimizer", "parameters"], residue=MIB)
    x.offload.clear()
    stays = x.offload.sizes()["gradients"]
    monkeypatch.setattr(copies, "allocated_bytes", lambda: stays + MIB)
    x.offload.clear()
    leaked = torch.zeros(9 * MIB)
    monkeypatch.setattr(copies, "allocated_bytes", lambda: stays + MIB + 1)
    with pytest.raises(
        RunError, match=r"1 were expected \(trainer.offload_residue_mb 1 .*36.0 MiB float32 \[9437184\]"
    ):
        x.offload.clear()
    del leaked


def test_the_largest_tensors_come_with_what_is_known_of_them():
    views = [torch.zeros(97, MIB)] * 2
    base = torch.zeros(50 * MIB, dtype=torch.int16)
    part = base[10:20]
    names = {base.untyped_storage().data_ptr(): "gradients"}
    lines = largest(CPU, names)
    assert "100.0 MiB int16 [52428800] (gradients)" in lines
    assert lines.count("388.0 MiB float32 [97, 1048576]") == 1
    assert [float(line.split()[0]) for line in lines] == sorted(
        [float(line.split()[0]) for line in lines], reverse=True
    )
    del views, part


def test_a_host_without_the_memory_is_named(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MIB))
    with pytest.raises(RunError, match=r"keeps 1.0 GiB in host memory \(trainer.offload\), 0.0 are free"):
        copies.host_block(1 << 30)
    assert copies.host_block(MIB).numel() == MIB


@pytest.mark.parametrize(("code", "limit"), [(0, 0), (2, 1 << 20), (2, -1)])
def test_page_locking_that_fails_is_said(monkeypatch, code, limit):
    """On a GPU; CUDA's function is a stand-in."""
    asked = []

    def register(address: int, size: int, flags: int) -> int:
        asked.append((address, size, flags))
        return code

    monkeypatch.setattr(copies, "current", lambda: copies.Device.CUDA)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(copies.resource, "getrlimit", lambda _: (limit, limit))
    if not code:
        block_B = copies.host_block(100)
        assert asked == [(block_B.data_ptr(), 100, 0)]
        return
    said = "1 MiB" if limit > 0 else "unlimited"
    with pytest.raises(RunError, match=f"error 2; RLIMIT_MEMLOCK is {said}"):
        copies.host_block(100)
