"""What the numbers of a run's last steps suggest: a sentence each with the number, what it means and what to set.

Pure: of rows of `metrics.jsonl` and some settings. The bounds are rules of thumb, and stand in the rules.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stare_megatron.host import program
from stare_megatron.metrics.jsonl import Row

WINDOW = 20
"""Steps that are looked at, the newest."""
_LEAST = 5  # steps, below which nothing is said
_MOST = 3  # pieces of advice at a time
_SLOW_MFU = 0.15
_QUANTIZED = 0.1  # nats a token between quantized engines and the trainer
_BAND = 0.3  # of the target, as in the reports


@dataclass(frozen=True)
class Advice:
    """`topic`: the same for the same advice with other numbers."""

    topic: str
    text: str


@dataclass(frozen=True)
class Settings:
    """What the rules need to know of a configuration; the defaults are its own.

    `corrected`: there is a rollout correction; `quantized`: engines are; `weaker`: what to do where STARE's weights are
    too weak, "" for another method.
    """

    mode: str = "sync"
    engines: int = 1
    max_staleness: int = 2
    group_size: int = 8
    max_response_tokens: int = 3072
    corrected: bool = False
    quantized: bool = False
    weaker: str = ""

    @property
    def oldest(self) -> int:
        """How many updates a trained token's policy may be behind."""
        return {"sync": 0, "one_step": 1}.get(self.mode, self.max_staleness)

    @staticmethod
    def of(flat: Mapping[str, object]) -> Settings:
        """From a resolved configuration as dotted key -> value; keys that are not there have their defaults."""

        def number(key: str, default: int) -> int:
            value = flat.get(key, default)
            return value if isinstance(value, int) else default

        own = Settings()
        return Settings(
            mode=str(flat.get("sampling.mode", own.mode)),
            engines=number("inference.engines", own.engines),
            max_staleness=number("sampling.max_staleness", own.max_staleness),
            group_size=number("rollout.group_size", own.group_size),
            max_response_tokens=number("rollout.max_response_tokens", own.max_response_tokens),
            corrected=flat.get("algorithm.correction.mode", "none") != "none",
            quantized=any(flat.get(key, "none") != "none" for key in ("inference.quantization", "trainer.fp8")),
            weaker=_weaker(flat) if flat.get("algorithm.method") == "stare" else "",
        )


def _weaker(flat: Mapping[str, object]) -> str:
    if flat.get("algorithm.stare.weight") == "auto":
        return "raise algorithm.stare.weight_bound"
    if flat.get("algorithm.stare.adaptive", False):
        return "raise algorithm.stare.weight_pos_max"
    if flat.get("algorithm.stare.controller", "on_off") != "on_off":
        return "raise algorithm.stare.weight_pos"  # the controller's bound
    return 'raise algorithm.stare.weight_pos, or set algorithm.stare.weight = "auto" in its place'


class _Steps:
    """The newest rows, and what the rules ask of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.count = len(rows)

    def values(self, name: str) -> list[float]:
        """Finite ones, of the steps that have it."""
        return [row[name] for row in self.rows if math.isfinite(row.get(name, math.nan))]

    def mean(self, name: str) -> float:
        """0 where no step has it."""
        return statistics.fmean(self.values(name) or [0.0])

    def most(self, name: str) -> float:
        return max(self.values(name), default=0.0)

    def share(self, part: str, whole: str) -> float:
        """Sum by sum; 0 of nothing."""
        total = sum(self.values(whole))
        return sum(self.values(part)) / total if total else 0.0


_Rule = Callable[[_Steps, Settings], str]


def advise(rows: Sequence[Row], settings: Settings) -> list[Advice]:
    """At most three, what spoils the learning before what costs time. `rows`: of the whole run or its end, in order."""
    if len(rows) < _LEAST:
        return []
    steps = _Steps(rows[-WINDOW:])
    said = ((topic, rule(steps, settings)) for topic, rule in _RULES.items())
    return [Advice(topic, text) for topic, text in said if text][:_MOST]


def _ungraded(s: _Steps, c: Settings) -> str:
    samples = sum(s.values("groups/sampled")) * c.group_size
    for name, what, cure in (
        (
            "ungraded",
            "got no grade and are not learned from",
            "see logs/, and raise reward.timeout if it was too short",
        ),
        ("failed", "failed in the engine or the environment", "see logs/"),
    ):
        share = sum(s.values(f"response/{name}")) / samples if samples else 0.0
        if share >= 0.02:
            return f"{_percent(share)} of the responses {what}: {cure}"
    return ""


def _mismatch(s: _Steps, c: Settings) -> str:
    apart = s.mean("mismatch/mean")
    # A policy that has been updated since differs for a good reason.
    if c.quantized and c.mode == "sync" and apart >= _QUANTIZED:
        return (
            f"with float8 engines and trainer differ by {apart:.3f} nats a token: the correction discards much of what "
            "is sampled; leave inference.quantization or trainer.fp8 out where the reward falls behind"
        )
    if not c.quantized and c.mode == "sync" and apart >= 0.02:
        cure = "look for a setting that differs (docs/rollout_correction.md)"
        cure += "" if c.corrected else ' and set algorithm.correction.mode = "truncate"'
        return f"engine and trainer differ by {apart:.3f} nats a token with the same weights: {cure}"
    if c.corrected and (bounded := s.mean("correction/bounded")) >= 0.05:
        return (
            f"{_percent(bounded)} of the tokens have a correction at its bound, so that they count less or not at all: "
            "let samples be newer (sampling.max_staleness), or raise algorithm.correction.high"
        )
    return ""


def _gradient(s: _Steps, c: Settings) -> str:
    norms = s.values("update/grad_norm")
    if not norms:
        return ""
    usual, most = statistics.median(norms), max(norms)
    if usual > 0 and most >= 5 * usual:
        return (
            f"the gradient's norm reached {most:.3g}, {most / usual:.0f} times its median of {usual:.3g}: a batch "
            "pulled much harder than others; if reward falls after it, lower trainer.optimizer.lr or clip_grad"
        )
    return ""


def _gate(s: _Steps, c: Settings) -> str:
    gates = s.values("stare/gate")
    if len(gates) < WINDOW or not c.weaker:
        return ""
    entropy, target = s.mean("policy/entropy"), s.mean("policy/target_entropy")
    if all(gates) and entropy < (1 - _BAND) * target:
        return (
            f"the gate was open in all of the last {len(gates)} steps and entropy is {entropy:.3f}, below its target "
            f"of {target:.3f}: the weights do not hold it; {c.weaker}"
        )
    if not any(gates) and entropy > (1 + _BAND) * target:
        return (
            f"the gate was shut in all of the last {len(gates)} steps: entropy {entropy:.3f} is above its target of "
            f"{target:.3f}, so that nothing is reweighted; for an effect now, raise algorithm.stare.target_entropy"
        )
    return ""


def _truncated(s: _Steps, c: Settings) -> str:
    share = s.mean("response/truncated")
    if share < 0.2:
        return ""
    return (
        f"{_percent(share)} of the responses are cut off by their budget ({c.max_response_tokens} tokens) before an "
        'answer: raise rollout.max_response_tokens, or leave them out of the loss with rollout.overlong = "mask"'
    )


def _groups(s: _Steps, c: Settings) -> str:
    dropped = s.share("groups/dropped", "groups/sampled")
    useless = dropped + s.share("groups/zero_variance_kept", "groups/sampled")
    if useless < 0.5:
        return ""
    solved, unsolved = (s.share(f"groups/{kind}_correct", "groups/sampled") for kind in ("all", "none"))
    kind = "easier" if unsolved > solved else "harder"
    return (
        f"{_percent(useless)} of the sampled groups have equal rewards and teach nothing ({_percent(solved)} solved by "
        f"every sample, {_percent(unsolved)} by none): take {kind} prompts (data.train) or a larger rollout.group_size"
    )


def _tail(s: _Steps, c: Settings) -> str:
    waited = sum(
        min(row.get("engine/tail_seconds", 0.0), row.get("time/rollout", 0.0)) for row in s.rows if "time/step" in row
    )
    total = sum(s.values("time/step"))
    share = waited / total if total else 0.0
    if share < 0.25:
        return ""
    more = 'set sampling.mode = "stream"' if c.mode == "one_step" else 'set sampling.mode = "one_step" or "stream"'
    return (
        f"sampling tail {_percent(share)} of the step: engines run nearly empty while the last tenth of the groups "
        f"ends; {more} (docs/sampling.md), or lower rollout.max_response_tokens"
    )


def _staleness(s: _Steps, c: Settings) -> str:
    if c.mode != "stream" or not c.max_staleness or s.mean("sync/staleness_p95") < c.max_staleness:
        return ""
    idle = s.mean("idle/engines")
    if idle < 0.2:
        return ""
    return (
        f"staleness is at its bound of {c.max_staleness} and the engines idle {_percent(idle)} of the time: ranks are "
        "the slower side; give them devices of the engines (trainer.world_size, inference.engines)"
    )


def _preemptions(s: _Steps, c: Settings) -> str:
    each = s.mean("engine/preemptions")
    if each < 1:
        return ""
    return (
        f"{each:.0f} requests a step lost their KV cache, which was {_percent(s.most('engine/kv_use_max'))} full, and "
        "were computed again: raise inference.vllm.gpu_memory_utilization, or lower inference.vllm.max_num_seqs"
    )


def _mfu(s: _Steps, c: Settings) -> str:
    for phase in ("update", "score"):
        values = s.values(f"rates/{phase}_mfu")
        share = s.share(f"time/{phase}", "time/step")
        if values and statistics.fmean(values) < _SLOW_MFU and share >= 0.2:
            return (
                f"the {phase} takes {_percent(share)} of the step at {_percent(statistics.fmean(values))} of what the "
                "GPUs can do: raise trainer.micro_batch_tokens, or search a layout: "
                f"`{program.called()} plan RUN.toml --search`"
            )
    return ""


def _overhead(s: _Steps, c: Settings) -> str:
    for phase, cure in (("save", "raise checkpoint.every"), ("push", 'try sync.method = "sharded"')):
        share = s.share(f"time/{phase}", "time/step")
        if share >= 0.2:
            return f"time/{phase} is {_percent(share)} of the step: {cure}"
    return ""


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


_RULES: Mapping[str, _Rule] = {
    "ungraded": _ungraded,
    "mismatch": _mismatch,
    "gradient": _gradient,
    "gate": _gate,
    "truncated": _truncated,
    "groups": _groups,
    "tail": _tail,
    "staleness": _staleness,
    "preemptions": _preemptions,
    "mfu": _mfu,
    "overhead": _overhead,
}
TOPICS = tuple(_RULES)
