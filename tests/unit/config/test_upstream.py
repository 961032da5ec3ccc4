import re
import subprocess
import sys

import pytest

from stare_megatron.config import upstream
from stare_megatron.errors import UserError


@pytest.mark.parts
def test_fields_are_those_of_the_installed_dataclass():
    """The source reading against the real import, in a process of its own."""
    code = (
        "import dataclasses\n"
        "from megatron.core.transformer.transformer_config import TransformerConfig as T, MLATransformerConfig as M\n"
        "print(*sorted({f.name for f in (*dataclasses.fields(T), *dataclasses.fields(M))}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=6000, check=True)
    assert upstream.megatron_fields() == set(done.stdout.split())


def test_options_exist_upstream():
    assert upstream.MEGATRON_OPTIONS.keys() - upstream.megatron_fields() == set()


@pytest.mark.parametrize(
    ("refused", "fields"),
    [
        (upstream.MEGATRON_REFUSED, upstream.megatron_fields()),
        (upstream.ENGINE_REFUSED, upstream.engine_arg_names()),
    ],
)
def test_every_pattern_of_a_refusal_is_of_a_field_and_none_of_an_option(refused, fields):
    for pattern, _ in refused:
        found = {field for field in fields if re.fullmatch(pattern, field)}
        assert found, pattern
        assert not found & (upstream.MEGATRON_OPTIONS.keys() | upstream.ENGINE_OPTIONS.keys())


def test_known_key_passes():
    upstream.check_megatron({"moe_router_dtype": "fp64"})


def test_a_misspelt_reserved_key_says_why_it_is_reserved():
    with pytest.raises(UserError, match=r"did you mean 'hidden_size'\? It is not settable here: it follows"):
        upstream.check_megatron({"hiden_size": 8})


def test_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"trainer\.megatron\.atention_softmax_in_fp32: .*'attention_softmax_in_fp32'"):
        upstream.check_megatron({"atention_softmax_in_fp32": True})


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("tensor_model_parallel_size", "set trainer.tensor_parallel instead"),
        ("bf16", "set model.dtype instead"),
        ("num_layers", "config.json"),
        ("hidden_dropout", "the run sets it itself"),
        ("fine_grained_activation_offloading", 'trainer.recompute = "full" instead'),
        ("cpu_offloading_weights", "set trainer.offload"),
    ],
)
def test_reserved_key_names_the_right_one(key, cure):
    with pytest.raises(UserError) as e:
        upstream.check_megatron({key: 2})
    assert str(e.value).startswith(f"trainer.megatron.{key} = 2: not settable here: ")
    assert cure in str(e.value)


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from stare_megatron.config import upstream as u; u.check_megatron({'moe_router_dtype': 'fp64'})\n"
        "print([m for m in ('torch', 'megatron', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert done.stdout.strip() == "[]"
