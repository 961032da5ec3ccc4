"""The kernels' benchmarks: that the forms they compare compute the same, and that the counters count."""

import pytest
import torch

from stare_megatron.algo.comm import OneRank
from stare_megatron.algo.dynamics import critical_surprisal
from stare_megatron.algo.selection import NEITHER
from stare_megatron.host import device
from tests.unit.plan.models import config_of
from tools import bench_logprobs, bench_selection, bench_stare, bench_trainer


def test_forms_agree_with_float64(monkeypatch):
    monkeypatch.setattr(bench_logprobs, "_megatron", lambda: ("formula", bench_logprobs.megatron_formula))
    g = torch.Generator().manual_seed(0)
    source, target = torch.randn(6, 500, generator=g) * 3, torch.randint(0, 500, (6,), generator=g)
    logp = torch.log_softmax(source.double(), -1)
    exact = logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    for form in bench_logprobs.forms().values():
        outputs = form(source.clone(), target)
        for got, want in zip(outputs, exact, strict=False):
            torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def test_gradients_agree(monkeypatch):
    monkeypatch.setattr(bench_logprobs, "_megatron", lambda: ("formula", bench_logprobs.megatron_formula))
    forms = bench_logprobs.forms()
    source, target = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)), torch.arange(6)

    def gradient(name):
        leaf = source.clone().requires_grad_()
        bench_logprobs._backward(forms[name](leaf * 1.0, target))
        return leaf.grad

    both = gradient("plain PyTorch + entropy")
    for name in ("verl (formula) + entropy", "ours + entropy and its gradient"):
        torch.testing.assert_close(gradient(name), both, atol=2e-6, rtol=0)
    torch.testing.assert_close(gradient("formula"), gradient("ours + entropy"), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, 3), (torch.float32, 4)])
def test_ours_reads_the_logits_once_and_writes_them_once(monkeypatch, dtype, passes):
    """One read forward; one read and one write backward: no other tensor of the logits' size is touched. Of fp32 logits
    there is no copy, so each chunk is read twice in a row: the counter cannot see that it is then in the cache."""
    monkeypatch.setattr(bench_logprobs, "_CACHED", 4 << 20)
    logits = torch.randn(40, 100_000, dtype=dtype)
    cost = bench_logprobs.measure(bench_logprobs.forms_of_ours()["ours + entropy"], logits, torch.arange(40), 0.0, 1)
    assert cost.moved == passes * logits.numel() * logits.element_size()


@pytest.mark.parametrize("number", [100, 5000])
def test_selections(number):
    value, subset = bench_selection.tokens(number)
    ids = torch.arange(number)
    want = bench_selection._oracle(number, 0.1)
    for name, choose in bench_selection.FORMS.items():
        chosen = choose(value, subset, ids, 0.1, OneRank())
        assert set(ids[chosen].tolist()) == want, name  # alone, approximate thresholds are exact too
        assert not chosen[subset == NEITHER].any()


def test_a_sensitivity_is_what_a_step_does_to_the_entropy():
    """Of the tokens that STARE's rules are timed on: S < 0 where a token is less likely than the critical one."""
    tokens = bench_stare.candidates(400, 0)
    critical_T = critical_surprisal(tokens.surprisal_T, tokens.entropy_T, tokens.sensitivity_T)
    clear_T = (tokens.surprisal_T - critical_T).abs() > 1e-3
    assert torch.equal((tokens.sensitivity_T < 0)[clear_T], (tokens.surprisal_T > critical_T)[clear_T])
    assert 0.02 < (tokens.sensitivity_T < 0).double().mean() < 0.9


def test_a_rank_is_set_against_its_plan(monkeypatch):
    monkeypatch.setattr(bench_trainer, "read_vocab_size", lambda _: 1000)
    rollout = {"prompts_per_step": 2, "group_size": 4, "max_response_tokens": 2000}
    config = config_of("qwen2.5-1.5b", rollout=rollout, data={"max_prompt_tokens": 512})
    monkeypatch.setattr(device, "gpus", lambda: ())
    assert bench_trainer.planned(config) is None
    monkeypatch.setattr(device, "gpus", lambda: (device.Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, "GPU-0"),))
    score, update, peak = bench_trainer.planned(config)
    assert update < score < 150_000
    assert 25 < peak / 2**30 < 60
