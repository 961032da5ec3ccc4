"""Stand-ins for GSM8K and a pretrained model where neither can be fetched: word problems in its published form, such
problems with worked answers of which half are right, and a byte-level model of 0.4M parameters that knows nothing yet.

python examples/gsm8k_cpu/make_small.py --out .cache/gsm8k_cpu
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stare_megatron.data.prepare.settings import INSTRUCTION

NAMES = ("Ann", "Ben", "Eva", "Joe", "Kim", "Leo", "Mia", "Sam", "Tom", "Zoe")
THINGS = ("pens", "cups", "figs", "nuts", "hats", "keys", "maps", "toys")
RIGHT = 0.5  # of the worked answers
READINGS = 16  # of each problem, each with an answer of its own
EOS, PAD = 256, 257  # after the bytes


def problems(count: int, held_out: bool, rng: random.Random) -> list[tuple[str, int, int]]:
    """Question and its two numbers; a pair of numbers is held out or not, whoever has the things."""
    found: dict[str, tuple[str, int, int]] = {}
    while len(found) < count:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        if ((a * 7 + b) % 5 == 0) is held_out:
            name, thing = rng.choice(NAMES), rng.choice(THINGS)
            question = f"{name} has {a} {thing} and buys {b} more. How many {thing} has {name} now?"
            found[question] = (question, a, b)
    return list(found.values())


def published(question: str, a: int, b: int) -> dict[str, str]:
    """A row as openai/gsm8k has them."""
    return {"question": question, "answer": f"There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}


def worked(a: int, b: int, rng: random.Random) -> str:
    """A response, right half of the time."""
    said = a + b if rng.random() < RIGHT else a + b + rng.choice((-2, -1, 1, 2))
    return f"{a}+{b}={said} \\boxed{{{said}}}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are bytes, 256 ends a text, 257 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    inner.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def make_model() -> Qwen2ForCausalLM:
    """Before it has read anything."""
    config = Qwen2Config(
        vocab_size=PAD + 1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder: model/, gsm8k_{train,test}.jsonl, worked.jsonl"
    )
    args = parser.parse_args(argv)
    rng = random.Random(0)
    torch.manual_seed(0)
    train, test = problems(1024, False, rng), problems(64, True, rng)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(published(*row)) + "\n" for row in rows)
        (args.out / f"gsm8k_{name}.jsonl").write_text(text)
    read = [
        {"prompt": f"{question}\n{INSTRUCTION}", "completion": worked(a, b, rng)}
        for _ in range(READINGS)
        for question, a, b in train
    ]
    (args.out / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read))
    make_model().save_pretrained(str(args.out / "model"))
    make_tokenizer().save_pretrained(str(args.out / "model"))
    print(f"{args.out}: {len(train)} and {len(test)} problems, {len(read)} worked answers, a model of random weights")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
