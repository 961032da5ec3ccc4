"""The configuration of a run: a TOML file, overridden on the command line by `key.sub=value`.

Every key is a field below with its meaning, unit and default; an unknown key is an error that names the nearest one.
`preflight.py` checks what needs more than this file (the model's shape, files, the machine).
"""

# A default given to Field by position is invisible to the type checker, which then misses arguments in `Section()`.
# pyright: reportCallIssue=false

from __future__ import annotations

import difflib
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from stare_megatron import methods
from stare_megatron.env_config import EnvConfig as EnvConfig
from stare_megatron.errors import UserError
from stare_megatron.methods import CorrectionConfig, Section, StareConfig
from stare_megatron.methods import Selector as Selector
from stare_megatron.observe import BenchmarkConfig as BenchmarkConfig
from stare_megatron.observe import EvalConfig as EvalConfig
from stare_megatron.observe import LoggingConfig as LoggingConfig
from stare_megatron.sandbox_config import SandboxConfig as SandboxConfig
from stare_megatron.training import CheckpointConfig as CheckpointConfig
from stare_megatron.training import OptimizerConfig as OptimizerConfig
from stare_megatron.training import TrainerConfig as TrainerConfig

Scalar = str | int | float | bool


class RunConfig(Section):
    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run and its folder.")
    dir: Path = Field(Path("runs"), description="Folder that holds run folders.")
    steps: int = Field(ge=1, description="Optimizer steps to train for.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random in the run.")
    min_free_mb: int = Field(
        0, ge=0, description="Free disk space a start asks for, MB; 0: estimated from the model and `[checkpoint]`."
    )
    resume: str = Field(
        "never",
        description="`never`: refuse a run folder that already has a checkpoint; `auto`: continue from its newest one; "
        "or the path of a checkpoint folder.",
    )
    resume_allow: list[str] = Field(
        default_factory=list,
        description="Keys or tables that may differ from those of the checkpoint although they change what is trained; "
        "see docs/checkpoints.md.",
    )


class ModelConfig(Section):
    path: Path = Field(description="Hugging Face checkpoint folder: config.json, safetensors, tokenizer.")
    weights: str = Field(
        "",
        description="Megatron-Core checkpoint folder whose weights the policy begins with instead of those in "
        "`model.path`: a converted one, or `.../checkpoints/step_N/trainer` of another run; empty: none.",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Compute dtype of trainer and engines.")


class DataConfig(Section):
    train: list[Path] = Field(min_length=1, description="Prompt files, JSONL or parquet.")
    prompt_key: str = Field("prompt", description="Column with the prompt: a string, or a list of chat messages.")
    answer_key: str = Field("answer", description="Column with the reference answer given to the reward.")
    id_key: str = Field("id", description="Column with a unique id; rows without it are numbered `file:line`.")
    source_key: str = Field("source", description="Column with the row's source; the file's stem if absent.")
    chat_template: bool = Field(False, description="Wrap a string prompt as a user message in the chat template.")
    shuffle: bool = Field(True, description="Shuffle prompts anew each epoch (seeded).")
    max_prompt_tokens: int = Field(1024, ge=1, description="Longest prompt, tokens.")
    overlong_prompts: Literal["drop", "refuse"] = Field(
        "drop", description="What to do with longer prompts: drop and count them, or refuse to start."
    )


class RewardConfig(Section):
    name: str = Field(description="Reward function, a name from the rewards registry, e.g. `math`, `order_free_sum`.")
    timeout: float = Field(
        10.0,
        gt=0,
        description="Seconds one answer may take to grade (`math`); then it counts as not graded and carries no loss.",
    )
    processes: int = Field(2, ge=1, description="Grading processes of each engine (`math`).")
    memory_mb: int = Field(
        1024, ge=256, description="Memory of a grading process, MB; an answer that takes more counts as not graded."
    )


class RolloutConfig(Section):
    prompts_per_step: int = Field(64, ge=1, description="Groups in an update batch.")
    group_size: int = Field(8, ge=2, description="Samples per prompt.")
    dynamic_sampling: bool = Field(True, description="Drop groups whose rewards are all equal and sample others.")
    prompts_per_generation: int = Field(
        0, ge=0, description="Prompts sampled per generation batch under dynamic sampling; 0: `prompts_per_step`."
    )
    max_refills: int = Field(
        10,
        ge=0,
        description="Further generation batches allowed for one update batch; then zero-variance groups fill it.",
    )
    max_response_tokens: int = Field(3072, ge=1, description="Longest response, tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; the trainer scores at the same one.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling threshold.")
    stop: list[str] = Field(default_factory=list, description="Strings that end a response (kept in it).")
    overlong: Literal["train", "mask"] = Field(
        "train",
        description="Trajectories that the token, turn or call budget ended: learned from, or left out of the loss.",
    )


class AlgorithmConfig(Section):
    """Defaults that a method's paper has otherwise are in `methods.METHODS`."""

    method: str = Field("stare", description="Method, a name from the registry; its page is docs/algorithms/NAME.md.")
    normalize_std: bool = Field(True, description="Divide the group-relative advantage by the group's std + 1e-6.")
    clip_low: float = Field(0.2, gt=0, le=1, description="eps_low of the clipped ratio; 1: no lower bound.")
    clip_high: float = Field(0.28, gt=0, description="eps_high of the clipped ratio.")
    dual_clip: float = Field(10.0, gt=1, description="c: bound on the loss of negative advantages, as a ratio.")
    reduction: Literal[
        "token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "sequence-mean-constant-length"
    ] = Field(
        "token-mean", description="How per-token losses become one number; denominators are those of the whole batch."
    )
    response_tokens: int = Field(
        0, ge=0, description="Response length that `dapo` and `dr_grpo` count by; 0: `rollout.max_response_tokens`."
    )
    correction: CorrectionConfig = Field(
        default_factory=lambda: CorrectionConfig(),
        description="Rollout correction: weights for what trainer and engine disagree about.",
    )
    dapo: methods.DapoConfig = Field(default_factory=lambda: methods.DapoConfig(), description="Settings of `dapo`.")
    clip_cov: methods.ClipCovConfig = Field(
        default_factory=lambda: methods.ClipCovConfig(), description="Settings of method `clip_cov`."
    )
    kl_cov: methods.KlCovConfig = Field(
        default_factory=lambda: methods.KlCovConfig(), description="Settings of method `kl_cov`."
    )
    entropy_bonus: methods.EntropyBonusConfig = Field(
        default_factory=lambda: methods.EntropyBonusConfig(), description="Settings of method `entropy_bonus`."
    )
    adaptive_entropy: methods.AdaptiveEntropyConfig = Field(
        default_factory=lambda: methods.AdaptiveEntropyConfig(), description="Settings of method `adaptive_entropy`."
    )
    entropy_advantage: methods.EntropyAdvantageConfig = Field(
        default_factory=lambda: methods.EntropyAdvantageConfig(), description="Settings of method `entropy_advantage`."
    )
    high_entropy_tokens: methods.HighEntropyTokensConfig = Field(
        default_factory=lambda: methods.HighEntropyTokensConfig(),
        description="Settings of method `high_entropy_tokens`.",
    )
    w_reinforce: methods.WReinforceConfig = Field(
        default_factory=lambda: methods.WReinforceConfig(), description="Settings of method `w_reinforce`."
    )
    stare: StareConfig = Field(default_factory=lambda: StareConfig(), description="Settings of method `stare`.")

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, tree: Any) -> Any:
        return methods.settle(tree, cls.model_fields["method"].default) if isinstance(tree, dict) else tree

    @model_serializer(mode="wrap")
    def _settings_in_use(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what the method does not use, so that what was written can be read."""
        kept = methods.METHODS[self.method].uses | methods.EVERY_METHOD | {self.method}
        return {key: value for key, value in handler(self).items() if key in kept}


class InferenceConfig(Section):
    engines: int = Field(1, ge=1, description="vLLM engines.")
    tensor_parallel: int = Field(1, ge=1, description="TP of each engine; one GPU a rank.")
    placement: Literal["colocated", "separate"] = Field(
        "colocated", description="Engines share the trainer's devices and take turns, or have their own."
    )
    max_model_len: int = Field(0, ge=0, description="Engine window, tokens; 0: longest prompt + longest response.")
    vllm: dict[str, Any] = Field(default_factory=dict, description="Further vLLM EngineArgs, by their upstream names.")


class SyncConfig(Section):
    probe_every: int = Field(
        1, ge=0, description="Compare engine and trainer log-probs after every n-th push; 0: never."
    )
    probe_threshold: float = Field(
        1e-3, gt=0, description="Largest mean |log-prob difference| on the probe prompt, nats; beyond it the run stops."
    )


class ClusterConfig(Section):
    address: str = Field(
        "local", description="`local` starts Ray on this machine; `auto` or HOST:PORT joins a cluster."
    )
    port: int = Field(
        0, ge=0, le=65535, description="TCP port where trainer ranks meet, on rank 0's node; 0: a free one."
    )
    object_store_mb: int = Field(512, ge=80, description="Object store of a local Ray, MB.")
    start_timeout: float = Field(600.0, gt=0, description="Seconds to wait for ranks and engines to be ready.")


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(description="The run itself.")
    model: ModelConfig = Field(description="The policy.")
    data: DataConfig = Field(description="Prompts.")
    reward: RewardConfig = Field(description="The reward.")
    rollout: RolloutConfig = Field(default_factory=lambda: RolloutConfig(), description="Sampling.")
    env: EnvConfig = Field(default_factory=lambda: EnvConfig(), description="What the policy acts in.")
    sandbox: SandboxConfig = Field(
        default_factory=lambda: SandboxConfig(),
        description='Where code that the policy writes is run, docs/sandbox.md; for `env.name = "tool_use"`.',
    )
    algorithm: AlgorithmConfig = Field(default_factory=lambda: AlgorithmConfig(), description="The objective.")
    trainer: TrainerConfig = Field(default_factory=lambda: TrainerConfig(), description="Megatron-Core ranks.")
    inference: InferenceConfig = Field(default_factory=lambda: InferenceConfig(), description="vLLM engines.")
    sync: SyncConfig = Field(default_factory=lambda: SyncConfig(), description="Weight pushes.")
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig(), description="What is saved.")
    logging: LoggingConfig = Field(default_factory=lambda: LoggingConfig(), description="Where metrics go.")
    eval: EvalConfig = Field(default_factory=lambda: EvalConfig(), description="Evaluation on held-out prompts.")
    cluster: ClusterConfig = Field(default_factory=lambda: ClusterConfig(), description="Ray.")

    @property
    def window(self) -> int:
        """Longest sequence, tokens."""
        return self.inference.max_model_len or self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def eval_response_tokens(self) -> int:
        """Longest response of an evaluation, tokens."""
        return self.eval.max_response_tokens or self.rollout.max_response_tokens

    @property
    def uses_sandbox(self) -> bool:
        """Whether code that the policy writes is run."""
        return self.env.name == "tool_use"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.dir / self.run.name

    @model_validator(mode="after")
    def _cross(self) -> Config:
        need = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.window < need:
            raise ValueError(
                f"inference.max_model_len {self.window} is shorter than data.max_prompt_tokens "
                f"{self.data.max_prompt_tokens} + rollout.max_response_tokens {self.rollout.max_response_tokens} = "
                f"{need}"
            )
        if self.eval.benchmarks and self.window <= self.eval_response_tokens:
            raise ValueError(
                f"eval.max_response_tokens {self.eval.max_response_tokens} leaves no room for a prompt in the window "
                f"of {self.window} tokens; lower it or set inference.max_model_len"
            )
        if self.uses_sandbox and self.sandbox.url and self.env.keep_state:
            raise ValueError(
                f"env.keep_state = true: the server at sandbox.url = {self.sandbox.url!r} keeps no state across calls; "
                "set env.keep_state = false, or leave sandbox.url empty"
            )
        if self.sandbox.node_resource and self.cluster.address == "local":
            raise ValueError(
                f"sandbox.node_resource = {self.sandbox.node_resource!r} names nodes of a cluster, but cluster.address "
                'is "local"; leave it empty, or join a cluster'
            )
        r, t = self.rollout, self.trainer
        if r.prompts_per_step % t.updates_per_batch:
            raise ValueError(
                f"rollout.prompts_per_step {r.prompts_per_step} is not a multiple of trainer.updates_per_batch "
                f"{t.updates_per_batch}"
            )
        sequences = r.prompts_per_step * r.group_size // t.updates_per_batch
        if sequences < t.data_parallel:
            raise ValueError(
                f"rollout.prompts_per_step x rollout.group_size / trainer.updates_per_batch = {sequences} sequences "
                f"cannot feed {t.data_parallel} data-parallel ranks"
            )
        generated = (r.prompts_per_generation or r.prompts_per_step) * (1 + r.max_refills)
        if r.dynamic_sampling and generated < r.prompts_per_step:
            raise ValueError(
                f"rollout.prompts_per_generation {r.prompts_per_generation} x (1 + rollout.max_refills "
                f"{r.max_refills}) = {generated} prompts cannot fill rollout.prompts_per_step = "
                f"{r.prompts_per_step}; raise one"
            )
        if r.prompts_per_generation and not r.dynamic_sampling:
            raise ValueError("rollout.prompts_per_generation is for rollout.dynamic_sampling = true")
        a = self.algorithm
        fault = methods.correction_fault(a.correction, r.temperature, r.top_p)
        if t.scoring == "rollout":
            settings = (a.method, a.stare, t.updates_per_batch, r.temperature, r.top_p)
            fault = fault or methods.rollout_scoring_fault(*settings)
        if fault:
            raise ValueError(fault)
        if not self.algorithm.response_tokens:
            length = {"response_tokens": r.max_response_tokens}
            object.__setattr__(self, "algorithm", self.algorithm.model_copy(update=length))  # frozen from here on
        stare = self.algorithm.stare
        if stare.target_schedule != "constant" and not stare.target_steps:
            settled = {"stare": stare.model_copy(update={"target_steps": self.run.steps})}
            object.__setattr__(self, "algorithm", self.algorithm.model_copy(update=settled))
        return self


def load(path: Path, overrides: list[str]) -> Config:
    """Read a TOML file and apply `key.sub=value` overrides (values are TOML; a bare word is a string).

    Relative paths in the file are resolved against the current directory.

    Raises:
        UserError: unreadable file, malformed TOML, unknown key, wrong value.
    """
    try:
        tree = tomllib.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: cannot read the configuration: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid TOML: {e}") from e
    for item in overrides:
        _override(tree, item)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    """Validate a nested mapping; `origin` names it in errors."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise UserError(_explain(e, origin)) from e


def _override(tree: dict[str, Any], item: str) -> None:
    key, eq, text = item.partition("=")
    parts = key.strip().split(".")
    if not eq or not all(parts):
        raise UserError(f"command line: {item!r} is not key.sub=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"command line: {item!r}: {part!r} is a value, not a table")
    node[parts[-1]] = value


def all_keys() -> dict[str, str]:
    """Every dotted key with its description, in order."""
    found: dict[str, str] = {}

    def walk(model: type[Section], prefix: str) -> None:
        for name, field in model.model_fields.items():
            kind = section_of(field.annotation)
            if kind is None or kind is not field.annotation:
                found[prefix + name] = field.description or ""
            if kind is not None:
                walk(kind, f"{prefix}{name}.")

    walk(Config, "")
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """The model of a table, or of each table of a list; None for other fields."""
    kind = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _explain(error: ValidationError, origin: str) -> str:
    """The first fault, as one line."""
    first = error.errors()[0]
    key = ".".join(part for part in first["loc"] if isinstance(part, str))
    if first["type"] == "extra_forbidden":
        keys = all_keys()
        tables = {k.rpartition(".")[0] for k in keys}
        near = difflib.get_close_matches(key, [*keys, *tables], n=1, cutoff=0.5)
        if not near:
            leaf = {k.rpartition(".")[2]: k for k in keys}
            near = [leaf[n] for n in difflib.get_close_matches(key.rpartition(".")[2], leaf, n=1)]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{origin}: unknown key {key!r}{hint}"
    if first["type"] == "missing":
        return f"{origin}: key {key!r} is missing: {all_keys().get(key, 'a table is required')}"
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "value_error" else f" = {first['input']!r}"
    return f"{origin}: {key}{value}: {message}" if key else f"{origin}: {message}"
