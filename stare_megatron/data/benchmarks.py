"""Held-out prompts to evaluate on, and the labels sources go by in metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stare_megatron.config import BenchmarkConfig, Config
from stare_megatron.data.prompts import PromptSet, load_prompts
from stare_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SOURCES = 32
OTHER = "other"


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A set of held-out prompts; each is sampled `samples` times."""

    name: str
    path: Path
    samples: int
    prompts: PromptSet
    labels: Mapping[str, str]


def load_benchmarks(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Benchmark, ...]:
    """Read, check and tokenise every file of `eval.benchmarks`, with the keys of `[data]`. No prompt is ever dropped.

    Raises:
        UserError: what `load_prompts` refuses, or a prompt that leaves no room in the window for
            `eval.max_response_tokens`.
    """
    return tuple(_load(config, benchmark, tokenizer) for benchmark in config.eval.benchmarks)


def _load(config: Config, benchmark: BenchmarkConfig, tokenizer: PreTrainedTokenizerBase) -> Benchmark:
    # The window decides what is too long here, not data.max_prompt_tokens.
    read = config.data.model_copy(update={"train": [benchmark.path], "max_prompt_tokens": 2**31})
    prompts = load_prompts(read, tokenizer)
    lengths = np.diff(prompts.ends, prepend=0)
    longest = int(lengths.argmax())
    if lengths[longest] + config.eval_response_tokens > config.window:
        raise UserError(
            f"eval.benchmarks: {benchmark.path}: prompt {prompts[longest].id!r} has {lengths[longest]} tokens, with "
            f"eval.max_response_tokens = {config.eval_response_tokens} more than the window of {config.window}; lower "
            "that, or set inference.max_model_len"
        )
    samples = benchmark.samples or config.eval.samples
    return Benchmark(benchmark.name, benchmark.path, samples, prompts, source_labels(prompts))


def source_labels(prompts: PromptSet) -> dict[str, str]:
    """Source -> its label in metric names: other characters than letters, digits, `.`, `_` and `-` become `_`.

    The `MAX_SOURCES` sources with the most prompts have a label of their own, the rest share `OTHER`. Sources that
    differ in replaced characters only share a label.
    """
    counts = {item["values"]: item["counts"] for item in prompts.sources.value_counts().to_pylist()}
    ranked = sorted(counts, key=lambda source: (-counts[source], source))
    return {s: re.sub(r"[^A-Za-z0-9._-]", "_", s) or "_" for s in ranked[:MAX_SOURCES]} | dict.fromkeys(
        ranked[MAX_SOURCES:], OTHER
    )
