"""Messages between two processes' ends: through memory that both map, and through gloo."""

from __future__ import annotations

import datetime
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gpu_stand_in import Gpu

from stare_megatron.errors import RunError
from stare_megatron.host import copies
from stare_megatron.sync import wire
from stare_megatron.sync.link import Inbox, Link, Outbox
from stare_megatron.sync.place import Carrier, machine
from stare_megatron.sync.slots import Slots

SIZE = 4 << 20
HOST = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    gpu.install(monkeypatch.setattr)
    return gpu


def pair() -> tuple[Link, Link]:
    """A rank and a worker of `engine 0`, in this process."""
    store = wire.host_store("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(Link, wire.join_store("127.0.0.1", store.port), "engine 0", 1, 1, 1)
        return Link(store, "engine 0", 0, 1, 1), worker.result(300)


def message(number: int, size: int) -> torch.Tensor:
    return torch.randint(0, 255, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def send_all(rank: Link, outbox: Outbox, sizes: list[int], carrier: Carrier) -> None:
    outbox.open([(rank, 0)] if carrier is Carrier.IPC else [])
    for number, size in enumerate(sizes):
        outbox.buffer()[:size].copy_(message(number, size))
        outbox.send(rank, 0, number, size, carrier)
    outbox.finish()


def outbox_of(carrier: Carrier) -> Outbox:
    return Outbox(SIZE, HOST, on_gpu=carrier in (Carrier.IPC, Carrier.NCCL))


def inbox_of(worker: Link, outbox: Outbox, sizes: list[int], carrier: Carrier) -> Inbox:
    coming = [(number, 0, size) for number, size in enumerate(sizes)]
    mapped = {0: Slots.at(outbox.address)} if carrier is Carrier.MAPPED and outbox.address else {}
    return Inbox(worker, coming, {0: carrier}, mapped, HOST)


@pytest.mark.parametrize("carrier", Carrier)
def test_messages_arrive_unchanged_and_in_order(carrier: Carrier, gpu: Gpu) -> None:
    rank, worker = pair()
    sizes = [SIZE, 1, SIZE // 2, SIZE, 8, SIZE]
    outbox = outbox_of(carrier)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # a push, and another
            sent = pool.submit(send_all, rank, outbox, sizes, carrier)
            inbox = inbox_of(worker, outbox, sizes, carrier)
            for number, got in enumerate(inbox):
                assert torch.equal(got, message(number, sizes[number]))
            del got
            inbox.close()
            sent.result(300)
    assert gpu.in_use == 0


@pytest.mark.parametrize("carrier", Carrier)
def test_a_worker_that_gives_up_is_named(carrier: Carrier, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; or when a send's time is up: gloo forgets one whose first bytes find the connection closed."""
    monkeypatch.setattr(wire, "TIMEOUT", datetime.timedelta(seconds=60))
    rank, worker = pair()
    outbox = outbox_of(carrier)
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_all, rank, outbox, [SIZE] * 8, carrier)
        receiving = iter(inbox_of(worker, outbox, [SIZE] * 8, carrier))
        next(receiving)
        receiving.close()
        worker.close()
        with pytest.raises(RunError, match=r"engine 0 \(worker 0\) ended, or gave a push of weights up"):
            sent.result(300)


@pytest.mark.parametrize("carrier", [Carrier.IPC, Carrier.NCCL])
def test_nobody_is_told_of_work_that_a_gpu_has_not_done(
    carrier: Carrier, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender waits for its packing where another process looks at it, and a worker for its copies before it answers:
    what it was sent may be overwritten then."""
    done: dict[int, list[str]] = {0: [], 1: []}
    who = threading.local()
    send = Link.send

    def noted(self: Link, tensor: torch.Tensor, rank: int, tag: int) -> object:
        done[self.rank].append(f"word {tag}" if tag < 10 else "greeting")
        return send(self, tensor, rank, tag)

    def waited() -> None:
        done[who.rank].append("done")
        gpu.finish()

    def push(rank: Link, outbox: Outbox) -> None:
        who.rank = 0
        send_all(rank, outbox, [8] * 3, carrier)

    monkeypatch.setattr(Link, "send", noted)
    monkeypatch.setattr(copies, "finish", waited)
    rank, worker = pair()
    outbox = outbox_of(carrier)
    who.rank = 1
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(push, rank, outbox)
        inbox = inbox_of(worker, outbox, [8] * 3, carrier)
        for _ in inbox:
            done[1].append("copies")
        inbox.close()
        sent.result(300)
    hello = ["greeting"] if carrier is Carrier.IPC else []
    packed = ["done"] if carrier is Carrier.IPC else []  # NCCL's stream waits for the packing by itself
    assert done[0] == [*hello, *(step for i in range(3) for step in (*packed, f"word {i}"))]
    assert done[1] == [*(step for i in range(3) for step in ("copies", "done", f"word {i}")), *hello]


def test_a_closed_end_says_so() -> None:
    rank, _ = pair()
    rank.close()
    with pytest.raises(RuntimeError, match="engine 0: the connections for weights were closed after an error"):
        rank.send(torch.zeros(1), 1, 0)


def test_parties_leave_each_other_notes() -> None:
    rank, worker = pair()
    rank.tell("plan", [[1, "w", [2, 3]]])
    assert worker.ask("plan") == [[1, "w", [2, 3]]]


def test_memory_is_mapped_by_other_processes_of_the_machine_and_goes_with_them() -> None:
    slots = Slots(4096)
    slots.tensors[1][:3] = torch.tensor([7, 8, 9], dtype=torch.uint8)
    code = """
import sys
from stare_megatron.sync.place import machine
from stare_megatron.sync.slots import Slots
print(machine(), Slots.at([int(a) for a in sys.argv[1:]])[1][:3].tolist())
"""
    call: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = call([sys.executable, "-c", code, *map(str, slots.address)], capture_output=True, text=True, timeout=600)
    assert done.stdout.split(" ", 1) == [machine(), "[7, 8, 9]\n"], done.stderr
