"""A real vLLM on a CPU whose routers say which experts they chose: `python replay_engine.py CHECKPOINT OUT`.

vLLM returns experts on GPUs only, but its routers have the hook that it takes them with. One request at a time, so that
what they say is of that request's tokens in their order. Run it with `device.engine_environment()`.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

REQUESTS, TOKENS, VOCAB = 16, 48, 256


def main(checkpoint: str, out: str) -> None:
    """Writes, of each request: prompt, response, log-probs, experts [tokens read, layers, top_k]."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        enable_prefix_caching=False,
        generation_config="vllm",
        logprobs_mode="raw_logprobs",
    )
    said: dict[int, list[Any]] = {}

    def listen(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, MoERunner):
                own = said.setdefault(module.layer_id, [])
                module.router.set_capture_fn(lambda ids, own=own: own.append(ids.clone().numpy()))

    llm.apply_model(listen)
    rng, found = np.random.default_rng(0), []
    for seed in range(REQUESTS):
        for own in said.values():
            own.clear()
        prompt = rng.integers(3, VOCAB, int(rng.integers(8, 40))).tolist()
        params = SamplingParams(max_tokens=TOKENS, seed=seed, logprobs=0, detokenize=False, ignore_eos=True)
        output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
        logprobs = [next(iter(entry.values())).logprob for entry in output.logprobs or []]
        experts = np.stack([np.concatenate(said[layer]) for layer in sorted(said)], 1).astype(np.uint8)
        found.append((prompt, list(output.token_ids), logprobs, experts))
    Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
