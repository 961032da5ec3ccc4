"""A tokenizer of bytes, with the special tokens and the chat template of Qwen's kind; needs no file."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = """\
{%- for m in messages -%}
{%- if m.role == "tool" -%}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" -%}<|im_start|>user{%- endif -%}
{{ "\n<tool_response>\n" + m.content + "\n</tool_response>" }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" -%}{{ "<|im_end|>\n" }}{%- endif -%}
{%- else -%}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}"""


def make(template: str = TEMPLATE, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, then `ADDED` (special) and `<tool_call>`, `</tool_call>` (added, not special)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens(list(ADDED))
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer
