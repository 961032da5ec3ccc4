import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stare_megatron import tasks
from stare_megatron.__main__ import main
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.errors import RunError, UserError
from stare_megatron.models.families import FAMILIES
from stare_megatron.tasks import make as make_module
from stare_megatron.tasks.make import make
from stare_megatron.tasks.tiny_model import default_settings, make_model, make_tokenizer, measure, save, warm_up

RANDOM = dataclasses.replace(default_settings("order_free_sum", 2, 0), max_batches=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(RANDOM, tmp_path_factory.mktemp("tiny") / "out", train_prompts=20, eval_prompts=10)


def test_the_checkpoint_loads_with_its_own_tokenizer_everywhere(made):
    model = AutoModelForCausalLM.from_pretrained(made.model)
    assert model.config.model_type == "qwen2"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # AutoTokenizer is what vLLM uses; both must keep numbers whole.
    for tokenizer in (load_tokenizer(made.model), AutoTokenizer.from_pretrained(made.model)):
        assert tokenizer("3 9 4 12 :").input_ids == [1, 15, 21, 16, 24, 5]
        assert tokenizer.decode([15, 4, 21, 6, 24]) == "3 + 9 = 12"
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_checkpoint_of_any_family_loads_with_its_own_tokenizer(kind, tmp_path):
    tokenizer = make_tokenizer(tasks.get("order_free_sum"))
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), num_hidden_layers=0, hidden_size=64, pad_token_id=0)
    save(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == kind
    assert AutoTokenizer.from_pretrained(tmp_path)("3 9 4 12 :").input_ids == [1, 15, 21, 16, 24, 5]


def test_a_folder_is_reused_until_something_changes(made, monkeypatch):
    def refuse(*args):
        raise AssertionError("built again")

    monkeypatch.setattr(make_module, "_build", refuse)
    again = make(RANDOM, made.folder, train_prompts=20, eval_prompts=10)
    assert again.reused
    assert again == dataclasses.replace(made, reused=True)
    with pytest.raises(AssertionError, match="built again"):
        make(RANDOM, made.folder, train_prompts=21, eval_prompts=10)
    text = made.train.read_text()
    made.train.write_text(text + "\n")
    with pytest.raises(AssertionError, match="built again"):
        make(RANDOM, made.folder, train_prompts=20, eval_prompts=10)
    made.train.write_text(text)
    assert sorted(p.name for p in made.folder.parent.iterdir()) == ["out"]  # nothing half-written is left


def test_another_seed_replaces_the_folder(tmp_path):
    first = make(RANDOM, tmp_path / "m", 5, 5)
    before = (first.model / "model.safetensors").read_bytes()
    second = make(dataclasses.replace(RANDOM, seed=1), tmp_path / "m", 5, 5)
    assert not second.reused
    assert (second.model / "model.safetensors").read_bytes() != before


def test_so_many_batches_are_done_whatever_comes_of_them(tmp_path, capsys):
    words = ["make-tiny-model", "--batches", "3", "--lr", "0.5", "--train-prompts", "20", "--eval-prompts", "5"]
    assert main([*words, "--out", str(tmp_path / "m")]) == 0
    assert "made: 3 batches of 64" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["--batches", "3", "--random"], ["--batches", "3", "--stop-accuracy", "0.1"], ["--batches", "0"], ["--lr", "0"]],
)
def test_options_of_a_warm_up_that_cannot_be_are_refused(tmp_path, words, capsys):
    assert main(["make-tiny-model", *words, "--out", str(tmp_path / "m")]) == 2
    assert words[0] in capsys.readouterr().err


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(UserError, match="not made by this tool"):
        make(RANDOM, tmp_path, 5, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="head size"):
        dataclasses.replace(RANDOM, heads=3)
    with pytest.raises(UserError, match="kv_heads"):
        dataclasses.replace(RANDOM, kv_heads=3)


def test_warm_up_learns_and_repeats():
    task = tasks.get("order_free_sum")
    prompts, tokenizer = task.prompts("train", 200, 0), make_tokenizer(task)
    # Long enough to learn the format, too short for a right answer: entropy falls from ln(112) = 4.7 nats.
    settings = dataclasses.replace(RANDOM, max_batches=30, batch_size=16)
    torch.set_num_threads(1)
    states = []
    for _ in range(2):
        model = make_model(settings)
        with pytest.raises(RunError, match=r"below 0\.12 after 30 batches"):
            warm_up(model, tokenizer, settings, prompts)
        states.append(model.state_dict())
    assert measure(model, tokenizer, task, prompts[:8], samples=2).entropy < 3.5
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_measure_reads_the_policy():
    task = tasks.get("order_free_sum")
    settings = dataclasses.replace(RANDOM, max_batches=1)
    prompts, model = task.prompts("train", 8, 0), make_model(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    uniform = measure(model, make_tokenizer(task), task, prompts, samples=2)
    assert uniform.entropy == pytest.approx(4.7185, abs=1e-3)  # ln 112
    assert (uniform.accuracy, uniform.greedy, uniform.mixed) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_the_demo_model_is_right_now_and_then(tmp_path):
    made = make(default_settings("order_free_sum", 2, 0), tmp_path / "m", 4096, 300)
    assert 0.08 < made.measured.accuracy < 0.25
    assert 0.4 < made.measured.entropy < 0.75
    assert made.measured.mixed > 0.3
