"""The rows of `test_effects.py` about `[inference]`."""

from __future__ import annotations

from tests.unit.config import probes
from tests.unit.config.rows import Refused, Seen

FLEET = "tests/unit/cluster/test_fleet.py::"
DISPATCH = "tests/unit/cluster/test_dispatch.py::"
NGRAM = {"inference.speculative.method": "ngram"}
ENGINES: dict[str, Seen | Refused | str] = {
    "inference.engines": Seen(probes.places, 3),
    "inference.tensor_parallel": Seen(probes.engine, 2),
    "inference.placement": "tests/unit/run/test_preflight.py::test_colocated_engines_fit_the_trainers_gpus",
    "inference.max_model_len": Seen(probes.engine, 50),
    "inference.routing_replay": Seen(probes.engine, True),
    "inference.quantization": Refused("fp8_per_channel", "is of 16-bit weights"),
    "inference.restarts": FLEET + "test_restarts_wait_longer_each_time_and_end",
    "inference.restart_backoff": FLEET + "test_restarts_wait_longer_each_time_and_end",
    "inference.min_engines": FLEET + "test_the_fewest_engines",
    "inference.answer_timeout": FLEET + "test_silence",
    "inference.spread_below": DISPATCH + "test_a_group_with_a_short_prompt_is_spread_below_a_limit",
    "inference.longest_first": DISPATCH + "test_longest_first_of_those_that_come_together",
    "inference.speculative.method": Seen(probes.engine, "ngram"),
    **{f"inference.speculative.{key}": Seen(probes.engine, 3, NGRAM) for key in ("tokens", "ngram_min", "ngram_max")},
    "inference.vllm": Seen(probes.engine, {"max_num_seqs": 5}),
}
