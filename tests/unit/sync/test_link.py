"""Messages between two processes' ends: through memory that both map, and through gloo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stare_megatron.errors import RunError
from stare_megatron.sync import wire
from stare_megatron.sync.link import Link, Outbox, Slots, inbox, machine

SIZE = 4 << 20


def pair() -> tuple[Link, Link]:
    """A rank and a worker of `engine 0`, in this process."""
    store = wire.host_store("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(Link, wire.join_store("127.0.0.1", store.port), "engine 0", 1, 1, 1)
        return Link(store, "engine 0", 0, 1, 1), worker.result(30)


def message(number: int, size: int) -> torch.Tensor:
    return torch.randint(0, 255, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def send_all(rank: Link, outbox: Outbox, sizes: list[int], mapped: bool) -> None:
    for number, size in enumerate(sizes):
        outbox.buffer()[:size].copy_(message(number, size))
        outbox.send(rank, 0, number, size, mapped=mapped)
    outbox.finish()


@pytest.mark.parametrize("mapped", [True, False])
def test_messages_arrive_unchanged_and_in_order(mapped: bool) -> None:
    rank, worker = pair()
    sizes = [SIZE, 1, SIZE // 2, SIZE, 8, SIZE]
    outbox = Outbox(SIZE)
    slots = {0: Slots.at(outbox.address)} if mapped else {}
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_all, rank, outbox, sizes, mapped)
        coming = [(number, 0, size) for number, size in enumerate(sizes)]
        for number, got in enumerate(inbox(worker, coming, slots)):
            assert torch.equal(got, message(number, sizes[number]))
        sent.result(30)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_worker_that_gives_up_is_named(mapped: bool) -> None:
    rank, worker = pair()
    outbox = Outbox(SIZE)
    slots = {0: Slots.at(outbox.address)} if mapped else {}
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send_all, rank, outbox, [SIZE] * 8, mapped)
        receiving = inbox(worker, [(number, 0, SIZE) for number in range(8)], slots)
        next(receiving)
        receiving.close()
        worker.close()
        with pytest.raises(RunError, match=r"engine 0 \(worker 0\) ended, or gave a push of weights up"):
            sent.result(30)


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
from stare_megatron.sync.link import Slots, machine
print(machine(), Slots.at([int(a) for a in sys.argv[1:]])[1][:3].tolist())
"""
    call: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = call([sys.executable, "-c", code, *map(str, slots.address)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split(" ", 1) == [machine(), "[7, 8, 9]\n"], done.stderr
