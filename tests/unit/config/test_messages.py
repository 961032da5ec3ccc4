"""What a mistake in a configuration is answered with."""

from pathlib import Path

import pytest

from stare_megatron import config
from stare_megatron.errors import UserError


def load(tmp_path, *overrides):
    file = tmp_path / "run.toml"
    file.write_text(
        'run.steps = 1\nmodel.path = "m"\ndata.train = ["a.jsonl"]\nreward.name = "math"\n[eval]\nbenchmarks = []\n'
    )
    return config.load(file, list(overrides))


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("trainer.tensor_paralel=2", "did you mean 'trainer.tensor_parallel'?"),
        ("algorithm.clip_ratio=0.2", "did you mean 'algorithm.clip_low' or 'algorithm.clip_high'?"),
        ("algorithm.gspo.clip=1", "gspo has no table of its own, its settings are keys of [algorithm]: clip_high,"),
        ("algorithm.temperature=1", "did you mean 'rollout.temperature' or 'eval.temperature'?"),
        ("trainer.lr=1", "did you mean 'trainer.optimizer.lr'?"),
        ("trainr.world_size=1", "unknown key 'trainr'; did you mean 'trainer'?"),
        ('eval.benchmarks=[{path="a", smaples=1}]', "did you mean 'eval.benchmarks.samples'?"),
        ("data.train=3", 'data.train = 3: must be a list, e.g. ["a", "b"]'),
        ("data.train=[]", "must have at least 1 entry"),
        ("data=3", "data = 3: must be a table"),
        ("run.steps=x", "run.steps = 'x': must be a whole number"),
        ("run.steps=0", "must be at least 1"),
        ("trainer.optimizer.lr=0", "must be above 0"),
        ("run.resume=true", "must be a string, in quotes"),
        ("logging.wandb=on", "must be 'offline', 'online' or 'disabled'"),
        ("algorithm.normalize_std=ja", "must be true or false"),
    ],
)
def test_a_mistake_is_answered_in_words_of_the_configuration(tmp_path, override, answer):
    with pytest.raises(UserError) as refused:
        load(tmp_path, override)
    assert answer in str(refused.value)
    assert "Input should" not in str(refused.value)


def test_nothing_is_suggested_where_nothing_is_near(tmp_path):
    with pytest.raises(UserError, match=r"unknown key 'algorithm\.stare\.beta_kl'$"):
        load(tmp_path, "algorithm.stare.beta_kl=1")


def test_a_file_that_is_not_there_is_answered_with_where_to_start(tmp_path):
    with pytest.raises(
        UserError, match=r"none\.toml: cannot read .*: No such file or directory; .*`stare-megatron example`"
    ):
        config.load(tmp_path / "none.toml", [])
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(UserError, match=r"Is a directory; name a file in it: run\.toml$"):
        config.load(tmp_path, [])


@pytest.mark.parametrize(
    ("read", "text", "answer"),
    [
        (config.load, "[sft]\nepochs = 1\n", r"\[sft\] is of supervised training; its command is `sft`, not `train`"),
        (config.load_sft, "[data]\nmax_prompt_tokens = 8\n[rollout]\n", r"\[rollout\] .* `train`, not `sft`"),
        # With tables of both it is a mistake in one of them.
        (config.load, "[sft]\n[rollout]\n", "unknown key 'sft'"),
        (config.load_sft, "[sft]\n[rollout]\n", "unknown key 'rollout'"),
    ],
    ids=["train", "sft", "both, train", "both, sft"],
)
def test_a_file_of_the_other_command_is_called_so(tmp_path, read, text, answer):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=answer):
        read(file, [])


def test_a_string_is_a_list_of_one(tmp_path):
    read = load(tmp_path, "data.train=b.jsonl", "eval.benchmarks=c.jsonl", "run.resume_allow=data")
    assert read.data.train == [Path("b.jsonl").absolute()]
    assert [b.name for b in read.eval.benchmarks] == ["c"]
    assert read.run.resume_allow == ["data"]


@pytest.mark.parametrize(
    ("others", "answer"),
    [
        ((), 'set inference.placement = "separate", or sampling.mode = "sync" or "stream"'),
        (("inference.placement=separate",), 'set algorithm.correction.mode = "truncate" or "mask"'),
        (
            ("inference.placement=separate", "algorithm.correction.mode=mask", "trainer.scoring=rollout"),
            'set trainer.scoring = "trainer"',
        ),
    ],
)
def test_sampling_ahead_is_refused_without_what_it_needs(tmp_path, others, answer):
    with pytest.raises(UserError) as refused:
        load(tmp_path, "sampling.mode=one_step", *others)
    assert answer in str(refused.value)
    assert load(tmp_path, *others).sampling.mode == "sync"
    load(tmp_path, "sampling.mode=one_step", "inference.placement=separate", "algorithm.correction.mode=mask")


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        (("sampling.kv=keep",), 'set sampling.kv = "recompute", or inference.placement = "separate"'),
        (("sampling.max_staleness=1", "sampling.over_sampling=1.5"), "set over_sampling to that at most"),
    ],
)
def test_a_stream_on_shared_devices_is_refused_what_it_cannot_keep(tmp_path, settings, answer):
    stream = ("sampling.mode=stream", "algorithm.correction.mode=mask")
    with pytest.raises(UserError) as refused:
        load(tmp_path, *stream, *settings)
    assert answer in str(refused.value)
    read = load(tmp_path, *stream, "sampling.over_sampling=0.5")
    assert read.inference.placement == "colocated"
    assert read.sampling.outstanding(32) == 48


def test_a_micro_batch_is_not_selected_from_where_it_has_tokens_of_several_ages(tmp_path):
    ahead = ("inference.placement=separate", "algorithm.correction.mode=mask", "algorithm.stare.scope=microbatch")
    with pytest.raises(UserError) as refused:
        load(tmp_path, "sampling.mode=stream", *ahead)
    assert 'set algorithm.stare.scope = "batch", which selects within each age' in str(refused.value)
    for more in (("sampling.mode=one_step",), ("sampling.mode=stream", "sampling.max_staleness=0")):
        assert load(tmp_path, *more, *ahead).algorithm.stare.scope == "microbatch"
    assert load(tmp_path, "sampling.mode=stream", *ahead, "algorithm.method=grpo").sampling.ahead
