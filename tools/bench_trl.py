"""A run's task, model, prompts and reward with TRL's GRPOTrainer: the other side of `tools/bench_loop.py --trl`.

python tools/bench_trl.py run.toml [KEY=VALUE ...] --steps N --out rows.jsonl

Needs `pip install trl`. Sampling is transformers' `generate`, in the same process; one update a batch, no reference
policy. Each step's line: `tokens` (sampled), `reward` (mean), `wall` (seconds).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stare_megatron import rewards
from stare_megatron.config import Config, load
from stare_megatron.data.prompts import PromptStream, load_prompts
from stare_megatron.data.tokenizer import load_tokenizer
from stare_megatron.types import Prompt, Span, SpanKind, Status, Trajectory

VERSION = 1  # of the policy, for all spans


def refuse(config: Config) -> None:
    """Raises: SystemExit: settings that TRL's trainer has no counterpart for."""
    r = config.rollout
    wrong = {
        "rollout.dynamic_sampling = true": r.dynamic_sampling,
        "rollout.stop": bool(r.stop),
        f"env.name = {config.env.name!r}": config.env.name != "single_turn",
        f"sampling.mode = {config.sampling.mode!r}": config.sampling.mode != "sync",
    }
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise SystemExit(f"TRL's GRPOTrainer samples each batch once, in turn: not with {', '.join(found)}")


class Graded:
    """The run's reward as TRL calls one; keeps what a step's line says."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        self.__name__ = config.reward.name
        self._reward = rewards.make_reward(config.reward, None, config.sandbox)
        self._prompts, self._tokenizer = prompts, tokenizer
        self.tokens, self.reward = 0, 0.0

    def __call__(self, *, completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
        found = asyncio.run(self._grade(completion_ids, row))
        self.tokens = sum(map(len, completion_ids))
        self.reward = sum(found) / len(found)
        return found

    async def _grade(self, completions: list[list[int]], rows: list[int]) -> list[float]:
        pairs = [(self._prompts[i], ids) for i, ids in zip(rows, completions, strict=True)]
        scores = await asyncio.gather(*(self._reward(p, self._trajectory(p, ids), self._tokenizer) for p, ids in pairs))
        return [score.reward for score in scores]

    def _trajectory(self, prompt: Prompt, ids: list[int]) -> Trajectory:
        asked, drawn = np.asarray(prompt.token_ids, np.int32), np.asarray(ids, np.int32)
        none, zeros = np.zeros(0, np.float32), np.zeros(len(drawn), np.float32)
        spans = (
            Span(SpanKind.PROMPT, asked, none),
            Span(SpanKind.ACTION, drawn, zeros, ((VERSION, len(drawn)),)),
        )
        status = Status.COMPLETED if ids[-1:] == [self._tokenizer.eos_token_id] else Status.TRUNCATED
        return Trajectory(prompt.id, 0, spans, status, (VERSION, VERSION), 0)


def train(config: Config, steps: int, out: Path) -> None:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    r, tokenizer = config.rollout, load_tokenizer(config.model.path)
    stream = PromptStream(load_prompts(config.data, tokenizer), config.run.seed, shuffle=True)
    prompts = [prompt for _ in range(steps) for prompt in stream.take(r.prompts_per_step)]
    texts = [tokenizer.decode(list(prompt.token_ids)) for prompt in prompts]
    graded = Graded(config, prompts, tokenizer)

    class Lines(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            line = {"tokens": graded.tokens, "reward": graded.reward, "wall": time.perf_counter() - self.began}
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    settings = GRPOConfig(
        output_dir=str(out.parent / "trl"),
        per_device_train_batch_size=r.prompts_per_step * r.group_size,
        num_generations=r.group_size,
        max_completion_length=r.max_response_tokens,
        temperature=r.temperature,
        top_p=r.top_p,
        learning_rate=config.trainer.optimizer.lr,
        lr_scheduler_type="constant",
        max_steps=steps,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=config.model.dtype == "bfloat16",
        seed=config.run.seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_dict({"prompt": texts, "row": list(range(len(texts)))})
    GRPOTrainer(str(config.model.path), graded, settings, data, processing_class=tokenizer, callbacks=[Lines()]).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = load(args.file, args.settings)
    refuse(config)
    train(config, args.steps, args.out)


if __name__ == "__main__":
    main()
