"""A tiny Qwen2-architecture checkpoint with its own tokenizer, warmed up on a generated task until it is right now and
then: what reinforcement learning can start from on a CPU.

Plain transformers and torch, on one thread, so that equal settings give equal weights on one kind of machine.
"""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

from stare_megatron import tasks
from stare_megatron.errors import RunError, UserError
from stare_megatron.tasks.base import SPECIAL_WORDS, Task, TaskPrompt, parts_of

_PAD, _BOS, _EOS, _UNK = range(4)
_NO_LOSS = -100
_CHECK_EVERY = 25
_TURNS = 3  # of a measured response; more calls than that are not right


@dataclass(frozen=True)
class TinyModelSettings:
    """Everything that decides the weights. Head size (hidden / heads): vLLM's CPU attention takes 32 and more.

    The rest is `stare_megatron.tasks.base.WarmUp`; `max_batches` = 0 leaves the model random; `stop_accuracy` None: all
    `max_batches` are done, whatever comes of them.
    """

    task: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    max_batches: int
    batch_size: int
    lr: float
    stop_accuracy: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.heads < 1 or self.hidden % self.heads or self.hidden // self.heads % 2:
            raise UserError(f"tiny model: hidden {self.hidden} / heads {self.heads} must be a whole, even head size")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(f"tiny model: heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")


@dataclass(frozen=True)
class WarmedUp:
    """What a warm-up took: optimizer steps and seconds."""

    batches: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What a model does on held-out prompts at temperature 1.

    `accuracy`: share of right samples; `greedy`: share of prompts right without sampling; `mixed`: share of groups of
    `samples` with right and wrong ones; `entropy`: mean over sampled tokens, nats.
    """

    accuracy: float
    greedy: float
    mixed: float
    entropy: float
    prompts: int
    samples: int


def default_settings(task: str, layers: int, seed: int) -> TinyModelSettings:
    """A task's own settings for a model of `layers` layers.

    Raises:
        UserError: unknown task.
    """
    warm_up = tasks.get(task).warm_up
    return TinyModelSettings(
        task=task,
        layers=layers,
        hidden=64,
        heads=2,
        kv_heads=2,
        mlp=192,
        max_batches=warm_up.max_batches,
        batch_size=warm_up.batch_size,
        lr=warm_up.lr,
        stop_accuracy=warm_up.stop_accuracy,
        seed=seed,
    )


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: `<bos>` begins every text; words are separated by spaces, or follow each other."""
    words = [*SPECIAL_WORDS, *task.words]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL_WORDS[_UNK])
    inner = Tokenizer(model)
    split = pre_tokenizers.WhitespaceSplit()
    if not task.spaced:
        longest_first = sorted(task.words, key=len, reverse=True)
        pattern = Regex("|".join(map(re.escape, longest_first)) + r"|[\s\S]")
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        inner.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    inner.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", special_tokens=[("<bos>", _BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face checkpoint: config.json, safetensors, tokenizer.

    transformers 5 loads every tokenizer of some kinds of model, qwen2 among them, as a byte-level BPE that splits
    numbers into digits, whatever tokenizer.json says, unless `auto_map` is set; the empty one keeps AutoTokenizer with
    the file. Of other kinds it takes the file, and breaks off at an empty `auto_map`.
    """
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    if model.config.model_type not in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        return
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, None]}}
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_model(settings: TinyModelSettings) -> Qwen2ForCausalLM:
    """The model before its warm-up, float32, random from the seed."""
    task = tasks.get(settings.task)
    config = Qwen2Config(
        vocab_size=len(SPECIAL_WORDS) + len(task.words),
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=512,
        initializer_range=0.05,  # at 64 channels transformers' 0.02 learns several times slower
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        pad_token_id=_PAD,
        dtype="float32",
    )
    torch.manual_seed(settings.seed)
    return Qwen2ForCausalLM(config)


def warm_up(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: TinyModelSettings, prompts: list[TaskPrompt]
) -> WarmedUp:
    """Train in place on randomly drawn right responses (the loss is on responses only) until `stop_accuracy`, or,
    without one, for `max_batches`.

    Raises:
        RunError: not reached in `max_batches`.
    """
    started = time.monotonic()
    task = tasks.get(settings.task)
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1.0))
    for done in range(1, settings.max_batches + 1):
        chosen = [prompts[rng.randrange(len(prompts))] for _ in range(settings.batch_size)]
        input_ids, labels = _supervised(tokenizer, [(p.text, parts_of(task, task.trace(p, rng))) for p in chosen])
        model.train()
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if settings.stop_accuracy is not None and done % _CHECK_EVERY == 0:
            accuracy = measure(model, tokenizer, task, prompts[:128], samples=4).accuracy
            if accuracy >= settings.stop_accuracy:
                return WarmedUp(done, time.monotonic() - started)
    if settings.max_batches and settings.stop_accuracy is not None:
        raise RunError(
            f"warm-up on {settings.task}: sampled accuracy below {settings.stop_accuracy} after "
            f"{settings.max_batches} batches; raise the number of batches or the learning rate"
        )
    return WarmedUp(settings.max_batches, time.monotonic() - started)


def _supervised(
    tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, list[tuple[str, str]]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded right (harmless under a causal mask): input ids and labels, int64 [rows, longest]. No loss on prompts and
    on what a tool answers."""
    encoded: list[tuple[list[int], list[int]]] = []
    for prompt, parts in rows:
        ids = list(tokenizer.encode(prompt))
        wanted = [_NO_LOSS] * len(ids)
        for written, answer in parts:
            action = tokenizer.encode(written, add_special_tokens=False)
            observation = tokenizer.encode(answer, add_special_tokens=False)
            ids += action + observation
            wanted += action + [_NO_LOSS] * len(observation)
        encoded.append(([*ids, _EOS], [*wanted, _EOS]))
    longest = max(len(ids) for ids, _ in encoded)
    input_ids = torch.full((len(encoded), longest), _PAD)
    labels = torch.full((len(encoded), longest), _NO_LOSS)
    for row, (ids, wanted) in enumerate(encoded):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(wanted)
    return input_ids, labels


@torch.no_grad()
def measure(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, prompts: list[TaskPrompt], samples: int
) -> Measured:
    """Sample `samples` responses a prompt at temperature 1 (seeded) and one greedily, and score them."""
    model.eval()
    torch.manual_seed(0)
    right, entropy = _sample(model, tokenizer, task, [p for p in prompts for _ in range(samples)], greedy=False)
    greedy, _ = _sample(model, tokenizer, task, prompts, greedy=True)
    groups = torch.tensor(right).view(len(prompts), samples).sum(1)
    return Measured(
        accuracy=sum(right) / len(right),
        greedy=sum(greedy) / len(greedy),
        mixed=float(((groups > 0) & (groups < samples)).float().mean()),
        entropy=entropy,
        prompts=len(prompts),
        samples=samples,
    )


def _sample(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, prompts: list[TaskPrompt], *, greedy: bool
) -> tuple[list[bool], float]:
    """Whether each response is right, and the mean entropy over sampled tokens, nats."""
    streams: list[list[int]] = [list(tokenizer.encode(p.text)) for p in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    entropies: list[torch.Tensor] = []
    going = list(range(len(prompts)))
    tool, call_end = task.tool, -1
    if tool is not None:
        call_end = int(tokenizer.convert_tokens_to_ids(tool.call_end))  # pyright: ignore[reportArgumentType]
    for _ in range(_TURNS):
        if not going:
            break
        turns, entropy = _turn(model, [streams[i] for i in going], [_EOS, call_end], task.max_response_tokens, greedy)
        entropies.append(entropy)
        called = []
        for i, turn in zip(going, turns, strict=True):
            written[i] += turn
            if tool is not None and turn[-1] == call_end:
                answer = tool.answer(str(tokenizer.decode(turn)))
                streams[i] += turn + tokenizer.encode(answer, add_special_tokens=False)
                called.append(i)
        going = called
    right = []
    for prompt, ids in zip(prompts, written, strict=True):
        text = str(tokenizer.decode(ids[:-1], skip_special_tokens=False))
        right.append(ids[-1] == _EOS and task.verify(prompt.text, prompt.answer, text).correct)
    return right, float(torch.cat(entropies).mean())


def _turn(
    model: Qwen2ForCausalLM, streams: list[list[int]], ends: list[int], max_tokens: int, greedy: bool
) -> tuple[list[list[int]], torch.Tensor]:
    """What is sampled after each stream, up to and with an id of `ends`, and the entropies there, nats, float32 [n]."""
    width = max(map(len, streams))
    input_ids = torch.tensor([[_PAD] * (width - len(ids)) + ids for ids in streams])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in streams])
    out: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            do_sample=not greedy,
            top_k=0 if not greedy else None,
            pad_token_id=_PAD,
            eos_token_id=[end for end in ends if end >= 0],
            max_new_tokens=max_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        ),
    )
    responses = out.sequences[:, width:]
    logprob = torch.stack(out.logits, dim=1).float().log_softmax(-1)
    ended = torch.isin(responses, torch.tensor(ends))
    ended_before = torch.nn.functional.pad(ended.cumsum(1)[:, :-1], (1, 0)) > 0
    entropy = -(logprob.exp() * logprob).sum(-1)[~ended_before]
    lengths = (~ended_before).sum(1).tolist()
    return [row[:n] for row, n in zip(responses.tolist(), lengths, strict=True)], entropy
