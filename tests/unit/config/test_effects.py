"""Every key of the configuration does something: a row for each says where that is seen."""

from __future__ import annotations

import ast
import functools
import re
from typing import Any

import pytest

from stare_megatron.config import OptimizerConfig, all_keys, parse
from stare_megatron.config.methods import METHODS
from stare_megatron.errors import UserError
from stare_megatron.host import device
from tests.configs import small_model
from tests.contracts.source import ROOT
from tests.unit.config import probes
from tests.unit.config.engine_effects import ENGINES
from tests.unit.config.rows import Refused, Seen
from tests.unit.config.test_config_properties import with_value


def method(name: str, value: Any, **beside: Any) -> Seen:
    return Seen(probes.objective, value, {"algorithm.method": name} | beside)


def stare(value: Any, **beside: Any) -> Seen:
    keys = {"weight_pos": 3.0, "variant": "C2", "fraction": 0.3} | beside
    return method("stare", value, **{f"algorithm.stare.{key}": v for key, v in keys.items()})


TWO, FOUR = {"trainer.world_size": 2}, {"trainer.world_size": 4}
WIDE = {"algorithm.clip_cov.low": 0.01, "algorithm.clip_cov.fraction": 0.9}
SHORT = {"algorithm.response_tokens": 60}
CORRECTION = {"level": "sequence", "high": 1.1, "low": 0.9}
MASK, KL = {"algorithm.correction.mode": "mask"}, {"algorithm.kl.coefficient": 0.5}
ADAM, TYPES = ("weight_decay", "beta1", "beta2", "eps", "clip_grad"), tuple(OptimizerConfig().types)
UNSET = {"weight_pos": 1.1, "weight_neg": 0.9, "fraction": 0.1}  # their defaults
LINEAR = {"target_schedule": "linear", "target_entropy_end": 0.9}
OF_A_STREAM = {"max_staleness": 1, "over_sampling": 0.5, "window": 0.5, "kv": "keep", "bank": False}
COSINE = {"trainer.optimizer.schedule": "cosine"}
# Where the effect of a key is seen: in what is made of the configuration, or in a test of its own.
TOOLS, POOL = "tests/unit/envs/test_tool_use.py::", "tests/sandbox/test_sandbox_pool.py::"
FLEET, PRECISE = "tests/unit/cluster/test_fleet.py::", "tests/unit/trainer/test_precise.py::test_what_upstream_is_told"
LOCAL = "tests/unit/checkpoint/test_local.py::"
JUDGE, FLOAT16 = "tests/unit/rewards/test_judge.py::", "tests/invariance/test_float16.py"
FORMAT, SUM = "tests/unit/rewards/test_format.py::", "tests/unit/rewards/test_sum.py::"
RESUMED = "tests/unit/checkpoint/test_settings.py::"
STORE, SINKS = "tests/unit/checkpoint/test_checkpoint_store.py::", "tests/unit/metrics/test_sinks.py::"
EFFECTS: dict[str, Seen | Refused | str] = {
    "run.name": Seen(probes.saved, "other"),
    "run.dir": Seen(probes.saved, "elsewhere"),
    "run.steps": Seen(probes.saved, 3),
    "run.seed": Seen(probes.engine, 7),
    "run.restarts": "tests/unit/run/test_recovery.py::test_restarts_are_limited",
    "run.min_free_mb": "tests/unit/run/test_run_folder.py::test_full_disk_is_found_first",
    "run.resume": "tests/unit/run/test_run_folder.py::test_a_run_with_steps_is_refused_with_the_cure",
    "run.resume_allow": RESUMED + "test_other_settings_are_refused_by_name_and_may_be_meant",
    "model.path": Seen(probes.engine, "elsewhere"),
    "model.weights": "tests/unit/run/test_preflight.py::test_weights_to_begin_with",
    "model.dtype": Seen(probes.megatron, "bfloat16"),
    "data.train": Seen(probes.prompts, ["BENCH"]),
    "data.prompt_key": Seen(probes.prompts, "q"),
    "data.answer_key": Seen(probes.prompts, "a"),
    "data.id_key": Seen(probes.prompts, "uid"),
    "data.source_key": Seen(probes.prompts, "group"),
    "data.extra_keys": Seen(probes.prompts, ["group"]),
    "data.chat_template": "tests/unit/data/test_prompts.py",
    "data.chat_template_kwargs": "tests/unit/data/test_template_kwargs.py",
    "data.date": "tests/unit/run/test_dated_resume.py",
    "data.shuffle": Seen(probes.prompts, False),
    "data.max_prompt_tokens": Seen(probes.engine, 17),
    "data.overlong_prompts": "tests/unit/data/test_prompts.py",
    "reward.name": "tests/unit/rewards/test_own_reward.py",
    "reward.timeout": "tests/unit/rewards/test_workers.py::test_hanging_answers_fail_alone_among_64",
    "reward.processes": "tests/unit/rewards/test_workers.py::test_hanging_answers_fail_alone_among_64",
    "reward.memory_mb": "tests/unit/rewards/test_workers.py::test_hanging_answers_fail_alone_among_64",
    **{f"reward.{key}": FORMAT + "test_all_demands_count" for key in ("tags", "pattern", "boxed", "prefix")},
    **dict.fromkeys(["reward.limit", "reward.buffer"], FORMAT + "test_soft_overlong_punishment"),
    **dict.fromkeys(
        ["reward.parts", "reward.parts.name", "reward.parts.weight"],
        SUM + "test_parts_are_weighed_and_added_and_each_is_measured",
    ),
    **dict.fromkeys(["reward.parts.label", "reward.correct"], SUM + "test_who_says_what_is_correct"),
    **{
        f"reward.{key}": "tests/unit/rewards/test_code_tests.py::test_all_or_a_fraction"
        for key in ("tests_key", "test_seconds", "tests_score", "max_tests", "tolerance")
    },
    **dict.fromkeys(
        [f"reward.{key}" for key in ("url", "model")], JUDGE + "test_nobody_at_the_address_is_refused_at_the_door"
    ),
    **{
        f"reward.{key}": JUDGE + "test_what_the_judge_is_asked"
        for key in ("system", "template", "problem_key", "after", "judge_tokens", "judge_temperature", "body")
    },
    "reward.api_key_env": JUDGE + "test_the_key_is_sent_and_said_nowhere",
    "reward.template_file": JUDGE + "test_a_template_from_a_file_is_kept_as_text",
    **{f"reward.{key}": JUDGE.removesuffix("::") for key in ("verdict", "json_key", "lowest", "highest")},
    "reward.pass_mark": JUDGE + "test_a_pass_mark_and_half_a_surrogate_pair",
    "reward.judge_seconds": JUDGE + "test_silence_and_a_dead_server_are_not_graded",
    "reward.attempts": JUDGE + "test_silence_and_a_dead_server_are_not_graded",
    "reward.concurrency": JUDGE + "test_requests_under_way_are_bounded",
    "rollout.prompts_per_step": Seen(probes.plan, 8),
    "rollout.group_size": Seen(probes.sampled, 8),
    "rollout.dynamic_sampling": Seen(probes.sampled, False),
    "rollout.max_refills": Seen(probes.sampled, 0),
    "rollout.max_response_tokens": Seen(probes.sampled, 30),
    "rollout.temperature": Seen(probes.sampled, 0.5),
    "rollout.top_p": Seen(probes.sampled, 0.5),
    "rollout.stop": Seen(probes.sampled, ["\n"]),
    "rollout.overlong": "tests/unit/rollout/test_runner_env.py::test_settings_reach_the_episodes",
    **{f"sampling.{key}": Refused(value, 'is for mode = "stream"') for key, value in OF_A_STREAM.items()},
    "sampling.mode": Refused("one_step", 'set inference.placement = "separate"'),
    "env.name": "tests/unit/rollout/test_runner_env.py::test_a_tool_needs_a_sandbox_and_one_turn_needs_none",
    "env.parser": TOOLS + "test_forms_within_an_answer",
    "env.tool": TOOLS.removesuffix("::"),
    "env.parallel_calls": TOOLS + "test_several_calls_of_a_turn_run_in_order",
    "env.max_turns": TOOLS + "test_budgets",
    "env.max_calls": TOOLS + "test_budgets",
    "env.max_observation_tokens": TOOLS + "test_a_long_result_keeps_both_ends",
    "env.episode_seconds": TOOLS + "test_budgets",
    "env.tool_seconds": TOOLS + "test_a_call_gets_what_time_is_left",
    "env.keep_state": TOOLS + "test_one_state_an_episode",
    "env.echo": TOOLS + "test_echo_is_asked_of_the_tool",
    "env.call_errors": TOOLS + "test_a_call_that_cannot_be_read_is_answered_with_its_error",
    "env.tool_failures": TOOLS + "test_a_failed_tool_fails_the_trajectory_or_is_shown",
    "env.final_answer": TOOLS + "test_void_turns",
    "env.void_turns": "tests/unit/rollout/test_runner_env.py::test_settings_reach_the_episodes",
    "sandbox.require": POOL + "test_a_level_that_is_not_there_is_refused_at_the_door",
    "sandbox.workers": Seen(probes.sandbox, 5),
    "sandbox.wall_seconds": Seen(probes.sandbox, 5.0),
    "sandbox.cpu_seconds": Seen(probes.sandbox, 5.0),
    "sandbox.memory_mb": Seen(probes.sandbox, 50),
    "sandbox.output_bytes": Seen(probes.sandbox, 50),
    "sandbox.scratch_mb": Seen(probes.sandbox, 5),
    "sandbox.scratch_files": Seen(probes.sandbox, 5),
    "sandbox.preload": POOL + "test_a_module_that_cannot_be_preloaded_is_named",
    "sandbox.sessions": Seen(probes.sandbox, 5),
    "sandbox.idle_seconds": POOL + "test_a_kept_state_that_is_not_used_ends",
    "sandbox.url": "tests/unit/run/test_run_sandbox.py::test_a_server_that_does_not_answer_is_refused",
    "sandbox.retries": "tests/sandbox/test_sandbox_remote.py::test_a_server_that_hangs_costs_bounded_time",
    "sandbox.actors": Seen(probes.places, 3, {"env.name": "tool_use"}),
    "sandbox.actor_cpus": Seen(probes.places, 3.0, {"env.name": "tool_use"}),
    "sandbox.node_resource": Refused("cpu", 'cluster.address is "local"'),
    "sandbox.queue_seconds": "tests/unit/cluster/test_sandboxes.py::test_waiting_is_bounded",
    "sandbox.health_seconds": "tests/unit/cluster/test_sandboxes.py",
    "algorithm.method": method("grpo", "gspo"),
    "algorithm.normalize_std": method("grpo", False),
    "algorithm.clip_low": method("grpo", 0.05),
    "algorithm.clip_high": method("grpo", 0.05),
    "algorithm.dual_clip": method("grpo", 1.1),
    "algorithm.reduction": method("grpo", "sequence-mean-token-mean"),
    "algorithm.response_tokens": method("dapo", 60),
    "algorithm.correction.mode": method("grpo", "truncate"),
    **{f"algorithm.correction.{k}": method("grpo", v, **MASK) for k, v in CORRECTION.items()},
    "algorithm.kl.coefficient": method("grpo", 0.5),
    **{f"algorithm.kl.{k}": method("grpo", v, **KL) for k, v in {"place": "reward", "estimator": "k2"}.items()},
    **{f"algorithm.kl.{k}": "tests/unit/run/test_reference.py" for k in ("reference", "residency")},
    **{f"algorithm.dapo.overlong_{k}": method("dapo", v, **SHORT) for k, v in {"share": 0.9, "penalty": 0.1}.items()},
    "algorithm.clip_cov.fraction": method("clip_cov", 0.5, **{"algorithm.clip_cov.low": 0.01}),
    "algorithm.clip_cov.low": method("clip_cov", 0.01, **{"algorithm.clip_cov.fraction": 0.9}),
    "algorithm.clip_cov.high": method("clip_cov", 0.3, **WIDE),
    "algorithm.kl_cov.fraction": method("kl_cov", 0.9),
    "algorithm.kl_cov.coefficient": method("kl_cov", 5.0),
    "algorithm.entropy_bonus.coefficient": method("entropy_bonus", 0.5),
    "algorithm.adaptive_entropy.target_entropy": method("adaptive_entropy", 0.01),
    "algorithm.adaptive_entropy.step": method("adaptive_entropy", 0.001),
    "algorithm.adaptive_entropy.maximum": method("adaptive_entropy", 0.0001),
    "algorithm.entropy_advantage.alpha": method("entropy_advantage", 0.01),
    "algorithm.entropy_advantage.kappa": method("entropy_advantage", 9.0),
    "algorithm.high_entropy_tokens.fraction": method("high_entropy_tokens", 0.7),
    "algorithm.w_reinforce.positive_weight": method("w_reinforce", 0.9),
    "algorithm.w_reinforce.entropy_coefficient": method("w_reinforce", 0.5),
    "algorithm.stare.variant": stare("O1", variant="C2"),
    "algorithm.stare.fraction": stare(0.9),
    "algorithm.stare.selector": stare("sensitivity"),
    "algorithm.stare.weight": stare("auto", **UNSET),
    "algorithm.stare.time_constant": stare(50.0, weight="auto", **UNSET),
    "algorithm.stare.weight_bound": stare(1.01, weight="auto", **UNSET),
    "algorithm.stare.weight_pos": stare(5.0),
    "algorithm.stare.weight_neg": stare(0.2),
    "algorithm.stare.target_entropy": stare(0.01),
    "algorithm.stare.target_schedule": stare("cosine", **LINEAR),
    "algorithm.stare.target_entropy_end": stare(0.01, **LINEAR),
    "algorithm.stare.target_steps": stare(2, **LINEAR),
    "algorithm.stare.scope": "tests/invariance/test_method_layouts.py",
    "algorithm.stare.controller": stare("proportional"),
    "algorithm.stare.band": stare(1.0, controller="proportional"),
    "algorithm.stare.kp": stare(1.0, controller="proportional_integral"),
    "algorithm.stare.ki": stare(9.0, controller="proportional_integral", kp=1.0),
    "algorithm.stare.adaptive": stare(True),
    "algorithm.stare.alpha": stare(0.1, adaptive=True),
    "algorithm.stare.weight_pos_max": stare(1.1, adaptive=True),
    "algorithm.stare.weight_neg_min": stare(0.1, adaptive=True, alpha=0.5),
    "trainer.world_size": Seen(probes.plan, 2),
    "trainer.tensor_parallel": Seen(probes.megatron, 2, TWO),
    "trainer.pipeline_parallel": Seen(probes.megatron, 2, TWO),
    "trainer.virtual_pipeline": Seen(probes.megatron, 2, TWO | {"trainer.pipeline_parallel": 2}),
    "trainer.context_parallel": Seen(probes.megatron, 2, TWO),
    "trainer.expert_parallel": Seen(probes.megatron, 2, TWO | {"model.path": "MOE"}),
    "trainer.sequence_parallel": Seen(probes.megatron, True, TWO | {"trainer.tensor_parallel": 2}),
    "trainer.distributed_optimizer": Seen(probes.adam, False),
    "trainer.micro_batch_tokens": Seen(probes.plan, 40),
    "trainer.logits_chunk_tokens": "tests/invariance/test_step_parity.py",
    "trainer.updates_per_batch": Seen(probes.plan, 2),
    "trainer.scoring": Refused("rollout", "needs rollout.temperature = 1"),
    "trainer.fp8": "tests/unit/trainer/test_float8.py::test_megatron_core_is_told",
    "trainer.recompute": Seen(probes.megatron, "full"),
    "trainer.recompute_modules": Seen(probes.megatron, ["core_attn"], {"trainer.recompute": "selective"}),
    "trainer.offload": "tests/unit/run/test_sizing.py::test_a_rank_that_leaves_the_gpu_gives_its_room_to_the_engine",
    "trainer.offload_step_mb": Refused(1, 'offload_step_mb = 1 is for offload = ["optimizer"]'),
    "trainer.offload_residue_mb": "tests/unit/trainer/test_offload.py::test_what_is_left_is_named",
    "trainer.optimizer.lr": Seen(probes.rates, 1e-3),
    "trainer.optimizer.warmup_steps": Seen(probes.rates, 3),
    "trainer.optimizer.schedule": Seen(probes.rates, "linear"),
    "trainer.optimizer.min_lr": Seen(probes.rates, 1e-7, COSINE),
    **{f"trainer.optimizer.{key}": Seen(probes.adam, 0.5) for key in ADAM},
    **{f"trainer.optimizer.{key}": PRECISE for key in ("precision_aware", *TYPES)},
    **{f"trainer.optimizer.{k}": FLOAT16 for k in ("initial_loss_scale", "loss_scale_window")},
    "trainer.megatron": Seen(probes.megatron, {"deterministic_mode": True}),
    **ENGINES,
    "sync.method": "tests/unit/host/test_device.py::test_how_weights_travel",
    "sync.probe_every": "tests/unit/run/test_weights.py::test_probed_every_nth_version",
    "sync.push_timeout": "tests/unit/run/test_sizing.py",
    "sync.probe_threshold": "tests/unit/run/test_weights.py",
    "checkpoint.every": Seen(probes.saved, 2),
    "checkpoint.asynchronous": STORE + "test_a_rescue_ends_the_save_under_way",
    "checkpoint.keep_last": STORE + "test_what_is_kept",
    "checkpoint.keep_every": STORE + "test_what_is_kept",
    "checkpoint.best_metric": STORE + "test_what_is_kept",
    "checkpoint.best_mode": STORE + "test_what_is_kept",
    "checkpoint.verify": STORE.removesuffix("::"),
    "checkpoint.local": LOCAL + "test_a_copy_is_what_a_save_would_have_been",
    "checkpoint.local_keep": LOCAL + "test_every_nth_is_copied_and_the_last_is_durable",
    "checkpoint.durable_every": LOCAL + "test_every_nth_is_copied_and_the_last_is_durable",
    "checkpoint.export_every": Seen(probes.saved, 2),
    "checkpoint.export_final": Seen(probes.saved, False),
    "logging.tensorboard": SINKS + "test_open_sinks_writes_everywhere_and_closes",
    "logging.wandb": SINKS + "test_open_sinks_writes_everywhere_and_closes",
    **dict.fromkeys(
        [f"logging.wandb_{key}" for key in ("project", "entity", "group", "tags", "notes", "job_type", "system")],
        SINKS + "test_wandb_is_told_project_entity_group_tags_and_notes",
    ),
    "logging.wandb_samples": SINKS + "test_samples_are_a_table_where_wandb_samples_says_so",
    **dict.fromkeys(
        ("logging.prometheus_port", "logging.prometheus_host"),
        "tests/unit/metrics/test_prometheus.py::test_values_are_served_where_the_settings_say",
    ),
    "logging.samples_every": Seen(probes.saved, 2),
    "logging.trace": "tests/unit/run/test_recorder.py::test_without_a_trace_nothing_is_kept_of_it",
    "logging.plan_constants": "tests/unit/run/test_forecast.py::test_measured_constants_are_those_of_the_plan",
    "logging.samples": "tests/unit/run/test_recorder.py",
    "logging.reflection_words": Seen(probes.reflections, ["so"]),
    "eval.every": Seen(probes.questions, 2),
    "eval.at_start": Seen(probes.questions, False),
    "eval.at_end": Seen(probes.questions, False),
    "eval.benchmarks": Seen(probes.questions, []),
    "eval.benchmarks.path": Seen(probes.questions, [{"path": "TRAIN", "name": "bench"}]),
    "eval.benchmarks.name": Seen(probes.questions, [{"path": "BENCH", "name": "other"}]),
    "eval.benchmarks.samples": Seen(probes.questions, [{"path": "BENCH", "samples": 3}]),
    "eval.samples": Seen(probes.questions, 3),
    "eval.temperature": Seen(probes.questions, 0.5),
    "eval.top_p": Seen(probes.questions, 0.5),
    "eval.greedy": Seen(probes.questions, False),
    "eval.max_response_tokens": Seen(probes.questions, 9),
    "eval.seed": Seen(probes.questions, 9),
    "eval.confidence": "tests/unit/metrics/test_eval_results.py::test_reductions",
    "eval.responses": "tests/unit/run/test_evaluate.py::test_responses_are_kept_for_reading",
    "cluster.address": "tests/unit/run/test_preflight.py::test_nobody_at_the_address",
    "cluster.port": "tests/unit/run/test_preflight.py::test_port_in_use",
    "cluster.object_store_mb": Seen(probes.places, 800),
    "cluster.start_timeout": "tests/unit/run/test_sizing.py",
    "watchdog.factor": "tests/unit/cluster/test_watchdog.py",
    "watchdog.floor": "tests/unit/cluster/test_watchdog.py",
    "watchdog.first": "tests/unit/run/test_sizing.py",
    "watchdog.limit": "tests/unit/cluster/test_watchdog.py",
}  # fmt: skip
BASE: dict[str, Any] = {
    "run.steps": 4, "run.dir": "runs", "model.dtype": "float32", "reward.name": "exact",
    "data.max_prompt_tokens": 8, "rollout.prompts_per_step": 4, "rollout.group_size": 4,
    "rollout.max_response_tokens": 24, "algorithm.method": "grpo",
    "trainer.micro_batch_tokens": 64, "checkpoint.every": 3, "checkpoint.export_every": 3, "eval.samples": 2,
    "logging.samples_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files by the name that stands for them in the table."""
    folder = tmp_path_factory.mktemp("effects")
    return {
        "TRAIN": str(probes.rows(folder / "train.jsonl")),
        "BENCH": str(probes.rows(folder / "bench.jsonl", first=20)),
        "MODEL": str(small_model(folder / "model")),
        "MOE": str(small_model(folder / "moe", experts=4)),
    }


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARE_DEVICE", "cpu")
    device.gpu_names.cache_clear()


def tree_of(made: dict[str, str], *changes: dict[str, Any]) -> dict[str, Any]:
    """`BASE` with changes: dotted keys; the names of files stand for their paths."""
    tree: dict[str, Any] = {}
    files = {"model.path": "MODEL", "data.train": ["TRAIN"], "eval.benchmarks": [{"path": "BENCH"}]}
    for keys in (BASE | files, *changes):
        for key, value in keys.items():
            tree = with_value(tree, key, _filled(value, made))
    return tree


def _filled(value: Any, made: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_filled(v, made) for v in value]
    if isinstance(value, dict):
        return {k: _filled(v, made) for k, v in value.items()}
    return made.get(value, value) if isinstance(value, str) else value


def test_every_key_has_a_row() -> None:
    own = {"algorithm.settings"}
    assert all_keys().keys() - EFFECTS.keys() - own == set(), "say where the effect of a new key is seen"
    assert EFFECTS.keys() - all_keys().keys() == set()


@pytest.mark.parametrize("key", [key for key, row in EFFECTS.items() if isinstance(row, Seen)])
def test_another_value_is_seen(key: str, made: dict[str, str]) -> None:
    row = EFFECTS[key]
    assert isinstance(row, Seen)
    where = key.rpartition(".")[0] if key.startswith("eval.benchmarks.") else key
    before, after = (parse(tree_of(made, row.beside, changes), "x") for changes in ({}, {where: row.value}))
    assert repr(row.probe(before)) != repr(row.probe(after))


@pytest.mark.parametrize("key", [key for key, row in EFFECTS.items() if isinstance(row, Refused)])
def test_a_value_that_cannot_be_is_refused(key: str, made: dict[str, str]) -> None:
    row = EFFECTS[key]
    assert isinstance(row, Refused)
    with pytest.raises(UserError, match=re.escape(row.words)):
        parse(tree_of(made, {"rollout.temperature": 0.5}, {key: row.value}), "x")


@functools.cache
def functions(file: str) -> dict[str, str]:
    """Source of each function of a test file, by name; "" for the whole file."""
    text = (ROOT / file).read_text()
    found = {"": text}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            begin = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(text.splitlines()[begin - 1 : node.end_lineno])
    return found


@pytest.mark.parametrize("key", [key for key, row in EFFECTS.items() if isinstance(row, str)])
def test_the_test_of_a_key_is_there_and_about_it(key: str) -> None:
    row = EFFECTS[key]
    assert isinstance(row, str)
    file, _, name = row.partition("::")
    assert re.search(rf"\b{key.rpartition('.')[2]}\b", functions(file)[name])


def test_a_key_without_effect_would_be_found(made: dict[str, str]) -> None:
    """The probes see what they are asked about, and nothing else: a key of another part changes nothing."""
    same = [parse(tree_of(made, changes), "x") for changes in ({}, {"logging.wandb_notes": "x"})]
    for probe in {row.probe for row in EFFECTS.values() if isinstance(row, Seen)}:
        first, second = map(repr, map(probe, same))
        assert first == second, probe


def test_every_method_has_its_own_settings_in_the_table() -> None:
    tables = {key.split(".")[1] for key in EFFECTS if key.count(".") == 2 and key.startswith("algorithm.")}
    assert {name for name in METHODS if any(key.startswith(f"algorithm.{name}.") for key in all_keys())} <= tables
