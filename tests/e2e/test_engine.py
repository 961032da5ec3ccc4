"""A real vLLM engine on a tiny random checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from stare_megatron.config import InferenceConfig
from stare_megatron.errors import RunError
from stare_megatron.sync.check import checksum, first_difference
from stare_megatron.types import Sampling, Status
from tests.e2e.engine_process import EngineProcess, started
from tests.e2e.tiny_qwen2 import EOS, make_model, reference_logprobs, save

WINDOW = 128
PROMPT = (1, 17, 33, 60)
NARROW = InferenceConfig(vllm={"max_num_batched_tokens": WINDOW, "max_num_seqs": 32})

pytestmark = pytest.mark.timeout(900)


def sampling(max_tokens: int = 24, stop: tuple[str, ...] = (), seed: int = 5, top_p: float = 1.0) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=1.0, top_p=top_p, stop=stop, seed=seed)


@pytest.fixture(scope="module")
def model():
    return make_model(tied=False, seed=0)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    folder = save(model, tmp_path_factory.mktemp("checkpoint"))
    with started(folder, NARROW, WINDOW) as process:
        yield process


def test_sampled_logprobs_are_those_of_transformers_at_temperature_1(engine: EngineProcess, model) -> None:
    order = Sampling(max_tokens=40, temperature=0.7, top_p=0.9, stop=(), seed=1)
    completion = engine.call("sample", PROMPT, order)
    assert completion.token_ids.dtype == np.int32
    assert completion.logprobs.dtype == np.float32
    expected = reference_logprobs(model, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_prompt_logprobs(engine: EngineProcess, model) -> None:
    token_ids = np.random.default_rng(0).integers(3, 112, WINDOW - 1)
    got = engine.call("logprobs", token_ids)
    assert got.shape == (WINDOW - 2,)
    np.testing.assert_allclose(got, reference_logprobs(model, token_ids), atol=1e-4)


def test_seeds_make_samples_reproducible_and_different(engine: EngineProcess) -> None:
    def group() -> list[tuple[int, ...]]:
        futures = [engine.submit("sample", PROMPT, sampling(seed=seed)) for seed in range(8)]
        return [tuple(f.result(200).token_ids) for f in futures]

    first = group()
    assert group() == first
    assert len(set(first)) == 8


def test_more_prompts_than_a_batch_takes(engine: EngineProcess) -> None:
    """vLLM used to sample after a part of a prompt, and to die of taking that back from a CPU's generator."""
    prompts = np.random.default_rng(1).integers(3, 112, (16, 50))

    def sampled(together: bool) -> list[list[int]]:
        futures = []
        for seed, prompt in enumerate(prompts):
            futures.append(engine.submit("sample", prompt.tolist(), sampling(max_tokens=8, seed=seed)))
            if not together:
                futures[-1].result(200)
        return [f.result(200).token_ids.tolist() for f in futures]

    assert sampled(together=True) == sampled(together=False)


def test_end_conditions(engine: EngineProcess) -> None:
    futures = [engine.submit("sample", PROMPT, sampling(max_tokens=100, seed=seed)) for seed in range(48)]
    completions = [f.result(200) for f in futures]
    ended = [c for c in completions if c.status is Status.COMPLETED]
    cut = [c for c in completions if c.status is Status.TRUNCATED]
    assert ended
    assert cut
    assert len(ended) + len(cut) == 48
    assert all(c.token_ids[-1] == EOS and EOS not in c.token_ids[:-1] for c in ended)
    assert all(len(c.token_ids) == 100 and EOS not in c.token_ids for c in cut)

    plain = next(c for c in cut if c.token_ids[6] not in c.token_ids[:6])
    seed = completions.index(plain)
    stopped = engine.call("sample", PROMPT, sampling(100, (f"w{plain.token_ids[6]}",), seed))
    assert stopped.status is Status.COMPLETED
    assert tuple(stopped.token_ids[:6]) == tuple(plain.token_ids[:6])
    assert f"w{stopped.token_ids[-1]}".startswith(f"w{plain.token_ids[6]}")
    assert len(stopped.logprobs) == len(stopped.token_ids) <= 7


def test_a_probe_does_not_wait_for_what_waits(engine: EngineProcess) -> None:
    """Five times as many samples as run at a time; the trainer waits for the probe after every push. In the order in
    which the engine answers, which this process may be late to see."""
    futures = [engine.submit("sample", PROMPT, sampling(max_tokens=100, seed=seed)) for seed in range(160)]
    probe = engine.submit("logprobs", np.arange(5, 60))
    for future in futures:
        future.result(400)
    assert len(probe.result(400)) == 54
    before = engine.answered[: engine.answered.index(probe)]
    assert len(set(before) & set(futures)) < 96


def test_a_prompt_that_fills_the_window_is_an_error(engine: EngineProcess) -> None:
    with pytest.raises(ValueError, match=f"{WINDOW} tokens in a window of {WINDOW}"):
        engine.call("sample", [5] * WINDOW, sampling())


def test_sampling_stops_at_the_window(engine: EngineProcess) -> None:
    completion = engine.call("sample", [5] * (WINDOW - 3), sampling(max_tokens=50, seed=0))
    assert completion.status is Status.TRUNCATED
    assert len(completion.token_ids) == 3


def test_checksums_are_those_of_the_checkpoint(engine: EngineProcess, model) -> None:
    mine = {name: checksum(p) for name, p in model.named_parameters()}
    theirs = engine.call("checksums")
    assert set(theirs) == set(mine)
    assert first_difference(mine, theirs) is None


def test_requests_wait_while_the_engine_sleeps(engine: EngineProcess) -> None:
    engine.call("sleep")
    began = engine.call("clock")
    waiting = engine.submit("sample", PROMPT, sampling())
    time.sleep(0.5)
    assert not waiting.done()
    engine.call("wake", "weights")
    time.sleep(0.2)
    assert not waiting.done()
    assert engine.call("clock") == began
    engine.call("wake", "kv_cache")
    assert len(waiting.result(200).token_ids)
    assert engine.call("clock") > began


@pytest.mark.parametrize("own_core", [False, True])
def test_a_failed_start_names_the_engine_and_the_cause_and_leaves_nothing(
    own_core, model, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A core of its own, as on GPUs, tells vLLM only that it failed."""
    folder = save(model, tmp_path / "checkpoint")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    process = EngineProcess("engine 3", folder, "float32", InferenceConfig(), WINDOW, 0, "gloo", own_core=own_core)
    try:
        with pytest.raises(RunError, match=r"^engine 3: vLLM did not start: [\w.]*SafetensorError: .*header too large"):
            process.call("start", timeout=400)
        assert process.descendants() == []
    finally:
        process.stop()
    said = "".join(capfd.readouterr())  # in a run: the engine's log
    assert "SafetensorError" in said
    assert ", in create_engine_config" in said or ", in make_client" in said


def test_a_core_in_a_process_of_its_own(engine: EngineProcess, model, tmp_path: Path) -> None:
    """As on GPUs: it samples the same, waits while it sleeps, and its death is reported."""
    folder = save(model, tmp_path / "checkpoint")
    own = EngineProcess("engine 1", folder, "float32", NARROW, WINDOW, 0, "gloo", own_core=True)
    try:
        own.call("start")
        (core,) = (p for p in own.descendants() if p.ppid() == own.process.pid)  # its worker is a child of it
        assert engine.descendants() == []
        for order in (sampling(), sampling(100, ("w7",), seed=8)):
            here, there = (e.call("sample", PROMPT, order) for e in (engine, own))
            assert here.token_ids.tolist() == there.token_ids.tolist()
            assert here.status is there.status
        own.call("sleep")
        waiting = [own.submit("sample", PROMPT, sampling(seed=seed)) for seed in range(40)]
        time.sleep(0.5)
        assert not any(w.done() for w in waiting)
        own.call("wake", "weights")
        own.call("wake", "kv_cache")
        assert all(len(w.result(200).token_ids) for w in waiting)

        core.suspend()  # so that the request is certainly in flight
        flying = own.submit("sample", PROMPT, sampling(100))
        time.sleep(0.2)
        core.kill()
        with pytest.raises(RunError, match="engine 1: its vLLM process died"):
            flying.result(200)
        with pytest.raises(RunError, match="engine 1: its vLLM process died"):
            own.call("sample", PROMPT, sampling())
        own.call("close")
        assert own.descendants() == []
        assert not core.is_running() or core.status() == psutil.STATUS_ZOMBIE
    finally:
        own.stop()


def test_a_refused_request_fails_alone(engine: EngineProcess) -> None:
    good = engine.submit("sample", PROMPT, sampling())
    bad = engine.submit("sample", (10**6,), sampling())
    with pytest.raises(Exception, match="out of vocabulary"):
        bad.result(200)
    assert len(good.result(200).token_ids)


def test_close_leaves_nothing(engine: EngineProcess) -> None:
    """Last, for it ends the module's engine."""
    flying = engine.submit("sample", PROMPT, sampling(100))
    engine.call("close")
    with pytest.raises(RunError, match="engine 0: it was closed"):
        flying.result(200)
    with pytest.raises(RunError, match="engine 0: not running"):
        engine.call("sample", PROMPT, sampling())
    assert engine.descendants() == []
