"""The synchronous sampler: a batch of the collector, and the state of the prompts that it took."""

from __future__ import annotations

from types import SimpleNamespace

from stare_megatron.data.prompts import StreamState
from stare_megatron.run.sampling import SynchronousSampler


def test_a_batch_is_collected_whole_and_the_state_is_that_of_the_prompts():
    stream = SimpleNamespace(cursor=0)
    stream.state = lambda: StreamState(0, stream.cursor, 7, "x")

    def collect(step):
        stream.cursor += 32
        return f"batch of version {step}"

    sampler = SynchronousSampler(SimpleNamespace(collect=collect), stream)
    assert sampler.state().cursor == 0
    assert sampler.next_batch(4) == "batch of version 4"
    assert sampler.state().cursor == 32
