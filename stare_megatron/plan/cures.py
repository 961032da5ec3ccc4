"""Changes of settings that make a run fit: each is tried by the plan before it is named."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stare_megatron.config import Config
from stare_megatron.plan.activations import Layers
from stare_megatron.plan.memory import Phase, Use

BUNDLE_MB = 4096  # of `trainer.offload_step_mb`, where it is proposed
CHUNK_TOKENS = 4096  # of `trainer.logits_chunk_tokens`

Changes = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What changed settings lead to. `engines`: whether these have room; `left`: how much does not fit; `seconds`: of
    the ranks' step, with what is moved in it."""

    uses: Sequence[Use]
    engines: bool
    left: int
    seconds: float

    def mends(self, phase: Phase | None) -> bool:
        """Whether GPUs are large enough in `phase`; None: whether engines have room."""
        if phase is None:
            return self.engines
        return all(use.free >= 0 for use in self.uses if use.phase is phase)


class Cures:
    """Of one configuration. Tried are, until one serves: settings of the ranks that change no result; with them an Adam
    in fewer bytes; tensor parallelism; moments in bfloat16, which are rounded; engines on GPUs of their own, which
    takes more of them. Where a change mends everything it is named for each fault, the fastest of its kind."""

    def __init__(self, config: Config, layers: Layers, outcome: Callable[[Config], Outcome | None]) -> None:
        """`layers`: Transformer Engine's have an Adam in fewer bytes. `outcome`: None where a run cannot be so."""
        self._config, self._outcome = config, outcome
        self._tiers = tuple(_tiers(config, layers))
        self._tried: dict[str, Outcome | None] = {}

    def of(self, phase: Phase | None) -> str:
        """What to set so that `phase`, None: the engines, fits; "" where nothing was found."""
        changes = self._whole or self._best(lambda found: found.mends(phase))
        return f"set {settings(changes)}" if changes else ""

    @functools.cached_property
    def _whole(self) -> Changes:
        return self._best(lambda found: not found.left)

    def _best(self, serves: Callable[[Outcome], bool]) -> Changes:
        for tier in self._tiers:
            serving = [(changes, found) for changes in tier if (found := self._try(changes)) and serves(found)]
            if serving:
                return min(serving, key=lambda item: (item[1].left, item[1].seconds, len(item[0])))[0]
        return {}

    def _try(self, changes: Changes) -> Outcome | None:
        key = repr(changes)
        if key not in self._tried:
            self._tried[key] = self._outcome(changed_config(self._config, changes))
        return self._tried[key]


def _tiers(config: Config, layers: Layers) -> Iterator[list[Changes]]:
    t = config.trainer
    own = [states | passes for states in ({}, *offloads(config)) for passes in _passes(config)]
    split: list[Changes] = []
    for tensor in (2 * t.tensor_parallel, 4 * t.tensor_parallel, 8 * t.tensor_parallel):
        if tensor <= 8 and t.world_size % (tensor * t.pipeline_parallel * t.context_parallel) == 0:
            split.append({"trainer.tensor_parallel": tensor, "trainer.sequence_parallel": True})
    precise = {"trainer.optimizer.precision_aware": True} if can_be_precise(config, layers) else {}
    for more in ([{}], split):
        yield [one | changes for one in more for changes in own if one | changes]
        if precise:
            yield [one | precise | changes for one in more for changes in own]
    if precise:
        moments = {f"trainer.optimizer.{key}": "bfloat16" for key in ("exp_avg_dtype", "exp_avg_sq_dtype")}
        yield [precise | moments | changes for changes in own]
    if config.inference.engines and config.inference.placement == "colocated":
        apart: Changes = {"inference.placement": "separate"}
        if "parameters" in t.offload:  # nobody wants their room then
            apart["trainer.offload"] = [name for name in t.offload if name != "parameters"]
        yield [apart]


def _passes(config: Config) -> Iterator[Changes]:
    """What makes forward and backward passes smaller, with nothing at all first."""
    t = config.trainer
    logits = {} if t.logits_chunk_tokens else {"trainer.logits_chunk_tokens": CHUNK_TOKENS}
    full: Changes = {} if t.recompute == "full" else {"trainer.recompute": "full"}
    if t.recompute_modules:
        full |= {"trainer.recompute_modules": []}
    yield {}
    if t.recompute == "none":
        yield {"trainer.recompute": "selective"}
    yield from (change for change in (logits, full) if change)
    if logits and full:
        yield logits | full
    tokens = t.micro_batch_tokens // 2
    while tokens >= config.window:
        yield logits | full | {"trainer.micro_batch_tokens": tokens}
        tokens //= 2


def movable(config: Config) -> list[str]:
    """What of the ranks' states may leave their GPUs: the parameters where engines want the room."""
    beside = config.inference.engines > 0 and config.inference.placement == "colocated"
    return ["gradients", "optimizer", *(["parameters"] if beside else [])]


def offloads(config: Config) -> Iterator[Changes]:
    """What of the ranks' states may leave their GPUs beyond what does already: the optimizer's, all, and a step in
    bundles."""
    t = config.trainer
    bundles = {"trainer.offload_step_mb": BUNDLE_MB}
    for classes in (["optimizer"], movable(config)):
        if set(classes) - set(t.offload):
            whole = {"trainer.offload": sorted({*classes, *t.offload})}
            yield whole
            if not t.offload_step_mb:
                yield whole | bundles
    if "optimizer" in t.offload and not 0 < t.offload_step_mb <= BUNDLE_MB:
        yield bundles


def can_be_precise(config: Config, layers: Layers) -> bool:
    """Whether the optimizer's state may take fewer bytes (`trainer.optimizer.precision_aware`), and does not yet."""
    t = config.trainer
    able = layers is Layers.ENGINE and t.distributed_optimizer and config.model.dtype != "float32"
    return able and not t.optimizer.precision_aware


def settings(changes: Mapping[str, Any]) -> str:
    """As `key=value`, by commas."""
    return ", ".join(f"{key}={value_text(value)}" for key, value in changes.items())


def value_text(value: Any) -> str:
    """A value as a command line or a TOML file has it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {value_text(inner)}" for key, inner in value.items()) + " }"
    return value if isinstance(value, str) else json.dumps(value)


def changed_config(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with keys of [trainer] and [inference] set, by their dotted names. Not checked again."""
    known = {"trainer": config.trainer, "inference": config.inference}
    tables: dict[str, Any] = {}
    for key, value in changes.items():
        name, _, inner = key.partition(".")
        table, (inner, _, last) = tables.get(name, known[name]), inner.partition(".")
        if inner == "vllm" and last:
            value = table.vllm | {last: value}
        elif inner == "optimizer" and last:
            value = table.optimizer.model_copy(update={last: value})
        tables[name] = table.model_copy(update={inner: value})
    return config.model_copy(update=tables)
