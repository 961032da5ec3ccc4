"""The parts of weight pushes and their check that need no engine."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch

from stare_megatron.errors import RunError
from stare_megatron.models.boxes import Box
from stare_megatron.models.hf_folder import grouped, spec_bytes
from stare_megatron.sync import wire
from stare_megatron.sync.check import (
    added,
    box_sum,
    checksum,
    compare,
    first_difference,
    merge_shards,
    require_agreement,
    shard_sum,
)
from stare_megatron.sync.fanout import EngineFanOut, rank_offsets
from stare_megatron.sync.source import ParamSpec, WeightStream


def make_weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(40, 8, generator=g),
        "norm": torch.randn(8, generator=g).bfloat16(),
        "proj": torch.randn(16, 8, generator=g).bfloat16(),
        "scale": torch.tensor([3], dtype=torch.int64),
    }


def make_specs(weights: dict[str, torch.Tensor]) -> tuple[ParamSpec, ...]:
    return tuple(ParamSpec(n, t.dtype, tuple(t.shape)) for n, t in weights.items())


def make_pair() -> tuple[wire.GlooGroup, wire.GlooGroup]:
    """A sender and a receiver in this process."""
    store = wire.host_store("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        peer = pool.submit(wire.GlooGroup.join, "127.0.0.1", store.port, 1, 2)
        return wire.GlooGroup(store, 0, 2), peer.result(300)


def test_buckets_keep_order_and_bound() -> None:
    specs = [ParamSpec(str(i), torch.float32, (n,)) for i, n in enumerate([2, 3, 4, 1, 1, 30, 1])]
    runs = [[s.name for s in run] for run in grouped(specs, spec_bytes, 20)]
    assert runs == [["0", "1"], ["2", "3"], ["4"], ["5"], ["6"]]
    assert grouped([], spec_bytes, 20) == []


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_tensors_travel_unchanged_to_every_receiver(limit: int) -> None:
    weights = make_weights()
    specs = make_specs(weights)
    got: dict[int, dict[str, torch.Tensor]] = {1: {}, 2: {}}
    store = wire.host_store("127.0.0.1")

    def worker(rank: int) -> None:
        group = wire.GlooGroup.join("127.0.0.1", store.port, rank, 3)
        for run in wire.receive(group, specs, limit):
            got[rank].update(run)

    threads = [threading.Thread(target=worker, args=(rank,), daemon=True) for rank in got]
    for thread in threads:
        thread.start()
    wire.send(wire.GlooGroup(store, 0, 3), specs, iter(weights.items()), limit, lambda: None)
    for thread in threads:
        thread.join(30)
    for received in got.values():
        assert list(received) == list(weights)
        assert all(torch.equal(received[n], t) and received[n].dtype == t.dtype for n, t in weights.items())


def test_a_receiver_that_gave_up_ends_the_send() -> None:
    group, peer = make_pair()
    big = {"w": torch.zeros(8 << 20)}  # more than sockets buffer, so the broadcast waits for its receiver

    def failed() -> None:
        raise RunError("engine 1 died")

    with pytest.raises(RunError, match="engine 1 died"):
        wire.send(group, make_specs(big), iter(big.items()), 1 << 20, failed)
    peer.close()  # as a worker does that fails; the sender's group could not be destroyed while it waits


def test_a_sender_that_failed_does_not_leave_receivers_waiting() -> None:
    group, peer = make_pair()
    group.close()
    with pytest.raises(RuntimeError, match=r"[Cc]onnection"):
        next(wire.receive(peer, make_specs(make_weights()), 1 << 20))
    with pytest.raises(RuntimeError, match="closed after an error"):
        group.broadcast(torch.zeros(1, dtype=torch.uint8), lambda: None)


def test_a_receiver_that_is_gone_ends_the_send() -> None:
    group, peer = make_pair()
    peer.close()
    big = {"w": torch.zeros(8 << 20)}
    with pytest.raises(RuntimeError, match=r"[Cc]onnection|closed|reset"):
        wire.send(group, make_specs(big), iter(big.items()), 1 << 20, lambda: None)


def test_stream_is_checked_against_its_specs() -> None:
    weights = make_weights()
    specs = make_specs(weights)
    assert list(WeightStream(specs, lambda: iter(weights.items())).checked()) == list(weights.items())
    with pytest.raises(ValueError, match="ended before 'scale'"):
        list(WeightStream(specs, lambda: iter(list(weights.items())[:-1])).checked())
    with pytest.raises(ValueError, match="'scale', which is not among"):
        list(WeightStream(specs[:-1], lambda: iter(weights.items())).checked())
    wrong = weights | {"norm": weights["norm"].float()}
    with pytest.raises(ValueError, match="'norm'"):
        list(WeightStream(specs, lambda: iter(wrong.items())).checked())


def test_rank_offsets_count_the_workers_before() -> None:
    infos = rank_offsets({"rank_offset": 1, "host": "h"}, [2, 1, 4])
    assert [i["rank_offset"] for i in infos] == [1, 3, 4]
    assert all(i["host"] == "h" for i in infos)
    assert rank_offsets({"packed": True}, [2, 2]) == [{"packed": True}] * 2


def test_fan_out_gives_each_engine_its_offset_and_the_version() -> None:
    calls = []
    client = EngineFanOut([2, 2], lambda method, arguments: calls.append((method, list(arguments))))
    client.init_weight_transfer_engine({"rank_offset": 1})
    client.finish_weight_update("7")
    assert calls == [
        ("init_weight_transfer_engine", [({"rank_offset": 1},), ({"rank_offset": 3},)]),
        ("finish_weight_update", [(7,), (7,)]),
    ]
    with pytest.raises(ValueError, match="version"):
        client.finish_weight_update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_every_element_and_its_place(dtype: torch.dtype) -> None:
    w = torch.randn(33, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = checksum(w)
    assert whole == checksum(w.clone()) == checksum(w.t().contiguous().t())
    changed = w.clone()
    changed[32, 6] = torch.nextafter(w[32, 6], torch.tensor(9.0, dtype=dtype))
    swapped = w.clone()
    swapped[[3, 9]] = swapped[[9, 3]]
    others = {checksum(t) for t in (changed, swapped, w.t(), -w, w.reshape(7, 33)[:, :32])}
    assert whole not in others
    assert checksum(w.reshape(-1)) != ""  # vectors have one, too
    zero = torch.zeros(3)
    assert checksum(zero) == checksum(-zero)


def test_checksum_adds_over_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stare_megatron.sync.check._CHUNK", 20)  # several chunks
    w = torch.randn(12, 10)
    rows = [shard_sum(w[i : i + 4], i, 0, 10) for i in (0, 4, 8)]
    columns = [shard_sum(w[:, i : i + 5], 0, i, 10) for i in (0, 5)]
    for parts in (rows, columns):
        assert merge_shards([{"w": (i, v)} for i, v in enumerate(parts)]) == {"w": checksum(w)}
    swapped = merge_shards([{"w": (i, shard_sum(w[j : j + 6], k, 0, 10))} for i, j, k in ((0, 6, 0), (1, 0, 6))])
    assert swapped["w"] != checksum(w)


def test_replicas_count_once_and_must_agree() -> None:
    w = torch.randn(6)
    value = int(checksum(w), 16)
    assert merge_shards([{"norm": (0, value)}, {"norm": (0, value)}]) == {"norm": checksum(w)}
    torn = merge_shards([{"norm": (0, value)}, {"norm": (0, value ^ 1)}])
    assert first_difference({"norm": checksum(w)}, torn) == "norm"


def test_boxes_add_up_to_the_tensor_and_so_do_the_ranks_shares() -> None:
    w = torch.randn(12, 10)
    boxes = [Box("w", (r, c), (r + 4, c + 5)) for r in (0, 4, 8) for c in (0, 5)]
    shares = [{"w": f"{box_sum(w[tuple(map(slice, b.begin, b.end))], b, w.shape):016x}"} for b in boxes]
    assert added(shares) == {"w": checksum(w)}
    bias = torch.randn(6)
    halves = [{"b": f"{box_sum(bias[i : i + 3], Box('b', (i,), (i + 3,)), (6,)):016x}"} for i in (0, 3)]
    assert added(halves) == {"b": checksum(bias[:, None])}
    assert added([{"a": "1"}, {}]) == {"a": "0000000000000001"}


def test_first_difference_follows_the_trainers_order() -> None:
    trainer = {"a": "1", "b": "2", "c": "3"}
    assert first_difference(trainer, {"c": "3", "b": "2", "a": "1"}) is None
    assert first_difference(trainer, {"c": "0", "b": "0", "a": "1"}) == "b"
    assert first_difference(trainer, {"a": "1"}) is None  # what the engine does not report is not compared
    biased = {"q.weight": "1", "q.bias": "2", "experts.0.bias": "3"}
    assert first_difference(biased, {"q.weight": "1"}) == "q.bias"  # unless it has the rest of the module
    assert first_difference(biased, {"q.weight": "1", "q.bias": "2"}) is None
    assert first_difference(trainer, trainer | {"lm_head.weight": "9"}) == "lm_head.weight"


def test_agreement_and_its_breach() -> None:
    engine = np.array([-1.0, -2.0, -3.0], np.float32)
    agreement = compare(engine, np.array([-1.0, -2.5, -3.1], np.float32))
    assert agreement.worst == 1
    assert agreement.mean == pytest.approx(0.2, abs=1e-6)
    assert agreement.max == pytest.approx(0.5)

    def never() -> str | None:
        raise AssertionError("checksums are for a breach")

    require_agreement("engine 0", 3, agreement, 0.25, never)
    with pytest.raises(RunError, match=r"engine 0 .*version 3.*0\.2.*'q_proj'"):
        require_agreement("engine 0", 3, agreement, 0.1, lambda: "q_proj")
    with pytest.raises(RunError, match="checksums of all parameters agree"):
        require_agreement("engine 0", 3, agreement, 0.1, lambda: None)
    with pytest.raises(RunError, match="nan"):
        require_agreement("engine 0", 3, compare(engine, engine * np.float32("nan")), 0.1, lambda: None)
    with pytest.raises(ValueError, match="shapes"):
        compare(engine, engine[1:])


def test_trainer_side_imports_no_vllm() -> None:
    modules = ", ".join(f"stare_megatron.sync.{name}" for name in ("sharded", "push", "check", "wire"))
    code = f"import {modules}, sys; sys.exit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_an_engine_that_cannot_join_ends_the_trainers_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from stare_megatron.sync.push import WeightPusher

    # For which the sender would wait for the engine, and the interpreter at its end for the sender.
    monkeypatch.setattr(wire, "TIMEOUT", timedelta(seconds=5))
    monkeypatch.setattr(wire, "JOIN_TIMEOUT", timedelta(seconds=5))

    def call(method: str, arguments: object) -> None:
        raise RunError("engine 1: no route to 127.0.1.1")

    weights = make_weights()
    stream = WeightStream(make_specs(weights), lambda: iter(weights.items()))
    pusher = WeightPusher("gloo", 0, stream, EngineFanOut([1, 1], call), "127.0.0.1")
    with pytest.raises(RunError, match="engine 1: no route"):
        pusher.connect()
