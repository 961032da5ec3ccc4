"""Speculative decoding in a real vLLM engine is exact: greedy tokens, log-probs, and how often tokens are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from stare_megatron.config import InferenceConfig
from stare_megatron.config.inference import SpeculativeConfig
from stare_megatron.types import Completion, Sampling
from tests.e2e.engine_process import EngineProcess, started
from tests.e2e.tiny_qwen2 import make_model, reference_logprobs, save

WINDOW = 128
REPEATS = (5, 6, 7, 8) * 3  # so that drafts are found from the first token on
NGRAM = SpeculativeConfig(method="ngram", ngram_min=1)

pytestmark = pytest.mark.timeout(1200)


def settings(speculative: SpeculativeConfig) -> InferenceConfig:
    return InferenceConfig(vllm={"max_num_batched_tokens": 256, "max_num_seqs": 32}, speculative=speculative)


@pytest.fixture(scope="module")
def model():
    return make_model(tied=False, seed=0)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory: pytest.TempPathFactory):
    return save(model, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[EngineProcess]:
    with started(folder, settings(NGRAM), WINDOW, 480) as process:
        yield process


def drawn(engine: EngineProcess, temperature: float, top_p: float, count: int) -> list[Completion]:
    orders = [Sampling(40, temperature, top_p, (), seed) for seed in range(count)]
    return [f.result(300) for f in [engine.submit("sample", REPEATS, order) for order in orders]]


@torch.no_grad()
def greedy(model, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_tokens_are_the_models(engine: EngineProcess, model) -> None:
    engine.call("load")
    tokens = drawn(engine, 0.0, 1.0, 1)[0].token_ids.tolist()
    assert tokens == greedy(model, REPEATS, len(tokens))
    load = engine.call("load")
    assert 0 < load.tokens_accepted < load.tokens_drafted
    assert load.iterations < len(tokens)  # passes were spared


def test_log_probs_of_what_was_drawn_are_the_models_own(engine: EngineProcess, model) -> None:
    for completion in drawn(engine, 0.7, 0.9, 48):
        expected = reference_logprobs(model, [*REPEATS, *completion.token_ids])[len(REPEATS) - 1 :]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_a_response_ends_at_the_window_and_at_a_stop_string(engine: EngineProcess, model) -> None:
    """Also where what ends it is in the middle of a draft that was kept."""
    assert len(engine.call("sample", [5, 6] * 62 + [5], Sampling(50, 0.0, 1.0, (), 0)).token_ids) == 3
    tokens = greedy(model, REPEATS, 24)
    for end in range(4, 20):
        word = f"w{tokens[end]}"
        found = engine.call("sample", REPEATS, Sampling(24, 0.0, 1.0, (word,), 0))
        first = next(n for n in range(24) if f"w{tokens[n]}".startswith(word))
        assert found.token_ids.tolist() == tokens[: first + 1]
        assert len(found.logprobs) == first + 1


def test_seeds_repeat_whatever_runs_beside(engine: EngineProcess) -> None:
    together = [c.token_ids.tolist() for c in drawn(engine, 1.0, 1.0, 12)]
    alone = [engine.call("sample", REPEATS, Sampling(40, 1.0, 1.0, (), seed)).token_ids.tolist() for seed in range(12)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 12


@pytest.mark.runs
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_tokens_are_drawn_as_often_as_the_model_says(engine: EngineProcess, model, temperature: float) -> None:
    """Two sums over all tokens that have mean 0 whatever the tokens before: surprisal less entropy, and repetitions of
    the fourth last token, which is what drafts mostly are, less their probability."""
    sums, variances, accepted = np.zeros(2), np.zeros(2), 0
    engine.call("load")
    completions = drawn(engine, temperature, 1.0, 300)
    accepted = engine.call("load").tokens_accepted
    for completion in completions:
        ids = torch.tensor([*REPEATS, *completion.token_ids.tolist()])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, len(REPEATS) - 1 : -1].double() / temperature
        logp = logits.log_softmax(-1)
        p = logp.exp()
        new, before = ids[len(REPEATS) :], ids[len(REPEATS) - 4 : -4]
        entropy = -(p * logp).sum(-1)
        repeat = p.gather(1, before[:, None])[:, 0]
        sums += (
            float((-logp.gather(1, new[:, None])[:, 0] - entropy).sum()),
            float(((new == before).double() - repeat).sum()),
        )
        variances += (float(((p * logp**2).sum(-1) - entropy**2).sum()), float((repeat * (1 - repeat)).sum()))
    assert accepted > 20
    assert (np.abs(sums) < 4 * np.sqrt(variances)).all(), (sums, np.sqrt(variances))


def test_the_probes_of_a_push_see_no_drafts(engine: EngineProcess, model) -> None:
    token_ids = np.random.default_rng(0).integers(3, 112, 40).tolist()
    np.testing.assert_allclose(engine.call("logprobs", token_ids), reference_logprobs(model, token_ids), atol=1e-4)
    assert engine.call("cache_gap", token_ids) < 1e-4
