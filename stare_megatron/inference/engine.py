"""One vLLM engine: token ids in, token ids and log-probs out, weights from the trainer.

Nothing here knows Ray. The process that makes an `Engine` must have been started with `device.engine_environment()`:
some of those variables are read when vLLM is imported.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from stare_megatron.config import InferenceConfig
from stare_megatron.config.upstream import check_engine_args
from stare_megatron.errors import EngineLostError, RunError
from stare_megatron.host import device
from stare_megatron.inference.awake import AwakeClock
from stare_megatron.inference.load import LoadMeter
from stare_megatron.inference.output import Output
from stare_megatron.inference.processes import ChildProcesses
from stare_megatron.types import Completion, Sampling, Status
from stare_megatron.types.report import EngineLoad

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    from stare_megatron.inference.front_end import Drawn, FrontEnd

T = TypeVar("T")

UNPUSHED = -1
"""Weight version of an engine that still has the weights of its checkpoint folder."""

_STATUS = {"stop": Status.COMPLETED, "length": Status.TRUNCATED}


class Engine:
    """An engine and its life: start, sample, take new weights, sleep and wake, close. Use it from one event loop.

    Args:
        name: how errors call it.
        model: Hugging Face checkpoint folder with a tokenizer.
        dtype: `float32`, `bfloat16` or `float16`.
        config: `[inference]`.
        window: longest sequence, prompt and response, tokens.
        seed: vLLM's own seed; each request brings another.
        transport: name of the weight-transfer backend, `device.weight_transport()`.
        keeps_kv: requests in flight keep the KV cache that older weights made when weights change.
    """

    def __init__(
        self,
        name: str,
        model: Path,
        dtype: str,
        config: InferenceConfig,
        window: int,
        seed: int,
        transport: str,
        keeps_kv: bool = False,
    ) -> None:
        check_engine_args(config.vllm, () if device.current() is device.Device.CUDA else ("gpu",))
        self.name = name
        self.window = window
        self.version = UNPUSHED
        self.updates = 0  # of weights; a version may come twice, when ranks go back to a checkpoint
        self._args: dict[str, Any] = {
            "model": str(model),
            "dtype": dtype,
            "max_model_len": window,
            "tensor_parallel_size": config.tensor_parallel,
            "seed": seed,
            # Where Mistral's own files lie beside Hugging Face's, vLLM would take configuration, weights and tokenizer
            # from them; everything else here reads Hugging Face's.
            **dict.fromkeys(("config_format", "load_format", "tokenizer_mode"), "hf"),
            "generation_config": "vllm",  # no sampling defaults from the checkpoint
            "logprobs_mode": "raw_logprobs",  # before temperature and top-p
            "enable_prefix_caching": True,
            "scheduling_policy": "priority",  # in the order of arrival, but for probes
            "weight_transfer_config": {"backend": transport},
            "worker_extension_cls": "stare_megatron.sync.worker.ChecksumExtension",
            **device.engine_args(config.placement == "colocated", config.tensor_parallel),
            **({"enable_return_routed_experts": True} if config.routing_replay else {}),
            **({"quantization": config.quantization} if config.quantization != "none" else {}),
            **config.speculative.engine_args,
            **config.vllm,
        }
        self.keeps_kv = keeps_kv
        self._routed = config.routing_replay
        self._llm: FrontEnd | None = None
        self._meter = LoadMeter()
        self._children = ChildProcesses()
        self._output = Output()
        self._ids = itertools.count()
        self._seeds: dict[str, int] = {}  # of samples under way, by request
        self._asleep = False
        self.clock = AwakeClock()

    async def start(self) -> None:
        """Load the checkpoint and get ready to sample.

        Raises:
            RunError: vLLM refuses the model or the settings, or its process dies; the message has the exception of the
                process that failed, and the file of its output. Nothing is left running.
        """
        from stare_megatron.inference.front_end import FrontEnd

        self._children.begin()
        os.environ["STARE_ENGINE_PARENT"] = str(os.getpid())  # see sync.plugin
        try:
            self._llm = FrontEnd(self._meter)
            await self._llm.start(self._args)
            self._children.unname_buffers()
            await self._llm.update_weight_version(str(UNPUSHED))
        except RuntimeError as e:
            await self.close()
            raise RunError(f"{self.name}: vLLM did not start: {self._output.explained(str(e))}") from e
        except BaseException:
            await self.close()
            raise

    async def sample(self, token_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Continue `token_ids`. The response keeps its end-of-sequence token or stop string.

        Raises:
            ValueError: the prompt fills the window.
            EngineLostError: the engine died.
        """
        from vllm.logprobs import FlatLogprobs
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        stop = list(sampling.stop)
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=stop or None,
            include_stop_str_in_output=bool(stop),
            detokenize=bool(stop),
            skip_special_tokens=False,  # a stop string may be, or hold, a special token
            logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = (await self._generate(token_ids, params)).outputs[0]
        ids = np.asarray(output.token_ids, np.int32)
        values = output.logprobs.logprobs if isinstance(output.logprobs, FlatLogprobs) else []
        logprobs = np.asarray(values, np.float32)
        if len(ids) != len(logprobs):
            raise RunError(f"{self.name}: {len(ids)} tokens came with {len(logprobs)} log-probs")
        status = _STATUS.get(output.finish_reason or "", Status.FAILED)
        routed = output.routed_experts if self._routed else None
        if self._routed and status is not Status.FAILED:
            # The last token was sampled and not read.
            read, need = 0 if routed is None else len(routed), len(token_ids) + len(ids) - 1
            if read < need:
                raise RunError(f"{self.name}: experts of {read} tokens came where {need} were read")
        drawn = output.weight_versions or []
        return Completion(
            token_ids=ids,
            logprobs=logprobs,
            status=status,
            weight_version=int(drawn[0].version) if drawn else self.version,
            routed_experts=routed,
            versions=tuple((int(span.version), span.end - span.start) for span in drawn),
        )

    async def drawn(self) -> dict[int, Completion]:
        """What has been drawn so far of each sample under way, by its seed; the status says nothing.

        Nothing where experts are returned: those of a request that goes on would be of the weights that it goes on by.

        Raises:
            EngineLostError: the engine died.
        """
        if self._routed:
            return {}
        found = await self._call(self._running().drawn())
        return {seed: self._so_far(found[name]) for name, seed in self._seeds.items() if name in found}

    def _so_far(self, drawn: Drawn) -> Completion:
        ends = [*(start for _, start in drawn.starts[1:]), len(drawn.token_ids)]
        runs = tuple((int(v), end - start) for (v, start), end in zip(drawn.starts, ends, strict=True))
        ids, logprobs = np.asarray(drawn.token_ids, np.int32), np.asarray(drawn.logprobs, np.float32)
        first = runs[0][0] if runs else self.version
        return Completion(ids, logprobs, Status.TRUNCATED, first, versions=runs)

    async def logprobs(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Log-prob of each token given those before it, float32 [n - 1], natural log, temperature 1; 1 < n < window."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        result = await self._generate(token_ids, params, first=True)
        table = result.prompt_logprobs or []
        chosen = [entry[token].logprob for token, entry in zip(token_ids, table, strict=True) if entry]
        return np.asarray(chosen, np.float32)

    async def cache_gap(self, token_ids: Sequence[int]) -> float:
        """|log-prob of the last token drawn after the others, where the prefix cache may serve them, less that of the
        prompt's last token|, nats: vLLM never takes prompt log-probs from the cache, so that they cannot tell that
        older weights filled it. What this computes stays in the cache for the next time."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        last = int(token_ids[-1])
        params = SamplingParams(
            max_tokens=1,
            logprobs=0,
            allowed_token_ids=[last],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        (drawn,) = (await self._generate(token_ids[:-1], params, first=True)).outputs[0].logprobs or [{}]
        return abs(drawn[last].logprob - float((await self.logprobs(token_ids))[-1]))

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the trainer, maybe again; returns when the transport's rendezvous is complete. An update that was begun
        and not finished is given up."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._call(self._running().collective_rpc("stare_give_up_update"))
        await self._call(self._running().init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    async def start_weight_update(self) -> None:
        """Stop scheduling (requests in flight wait) and prepare the model for new weights."""
        llm = self._running()
        await self._call(llm.pause_generation(mode="keep", clear_cache=False))
        await self._call(llm.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Receive weights. Returns when they are in the model."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._call(self._running().update_weights(WeightTransferUpdateRequest(update_info)))

    async def give_up_weight_update(self) -> None:
        """An update that was begun will not go on: leave the trainer, so that it does not wait."""
        await self._call(self._running().collective_rpc("stare_give_up_update", args=(True,)))

    async def finish_weight_update(self, version: int) -> None:
        """Put the weights to use as `version` and drop what older ones computed.

        The prefix cache is emptied; requests in flight lose their KV cache, which is recomputed, and go on. With
        `keeps_kv` all of it stays: later requests find none of it, for they look by the update they begin with.
        """
        llm = self._running()
        # First: who comes meanwhile is sampled after it, and must not look by the one before.
        self.version = version
        self.updates += 1
        await self._call(llm.finish_weight_update(str(version)))
        if not self.keeps_kv:
            await self._call(llm.reset_prefix_cache(reset_running_requests=True))
        if not self._asleep:
            await self._call(llm.resume_generation())

    async def checksums(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Checksum of each parameter the model computes with now, by its Hugging Face name (see `sync.check`); of those
        of `names`, if any are named."""
        return (await self._call(self._running().collective_rpc("stare_checksums", args=(list(names),))))[0]

    async def reset_prefix_cache(self) -> None:
        """Empty the prefix cache, so that what was sampled before has no part in what comes; nothing is in flight."""
        await self._call(self._running().reset_prefix_cache())

    async def sleep(self) -> None:
        """Yield the devices to the trainer: on GPUs weights and KV cache are dropped, on CPUs the engine only pauses.

        The weights are not kept: `wake("weights")`, a push and `wake("kv_cache")` must follow, in this order.
        """
        llm = self._running()
        self.clock.stand()
        if device.engine_sleeps():
            await self._call(llm.sleep(level=2, mode="keep"))
        else:
            await self._call(llm.pause_generation(mode="keep", clear_cache=False))
        self._asleep = True

    async def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Take memory back for one part; with the KV cache sampling goes on."""
        llm = self._running()
        if device.engine_sleeps() and self._asleep:
            await self._call(llm.wake_up(tags=[part]))
        elif part == "kv_cache":
            await self._call(llm.resume_generation())
        if part == "kv_cache":
            self._asleep = False
            self.clock.go()

    async def answer(self) -> None:
        """Returns when vLLM's core has answered, which it does between two iterations of its scheduler.

        Raises:
            EngineLostError: the engine died.
        """
        await self._call(self._running().answer())

    def stopped(self) -> str:
        """Names a process of the engine that is stopped (SIGSTOP); "" if none is."""
        return self._children.stopped()

    def load(self) -> EngineLoad:
        """How full it was since this was last asked."""
        return self._meter.take()

    def peak_memory_bytes(self) -> int:
        """Sum over this process and those of the engine of each one's largest resident size so far (Linux)."""
        return self._children.peak_memory_bytes()

    async def close(self) -> None:
        """End the engine and every process it started. Harmless when repeated or never started."""
        llm, self._llm = self._llm, None
        ended = asyncio.get_running_loop().run_in_executor(None, self._children.end)  # vLLM waits longer for the deaf
        if llm is not None:
            llm.shutdown()
        await ended

    def _running(self) -> FrontEnd:
        if self._llm is None:
            raise RunError(f"{self.name}: not running")
        return self._llm

    async def _generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, first: bool = False
    ) -> RequestOutput:
        """`first`: before what waits."""
        from vllm.inputs.engine import tokens_input

        if not 0 < len(token_ids) < self.window:
            raise ValueError(f"{self.name}: a prompt of {len(token_ids)} tokens in a window of {self.window}")

        async def last() -> RequestOutput:
            prompt = tokens_input([int(t) for t in token_ids], cache_salt=f"update {self.updates}")
            name = f"{self.name}-{next(self._ids)}"
            if params.seed is not None:
                self._seeds[name] = params.seed
            try:
                async for output in self._running().generate(prompt, params, name, -1 if first else 0):
                    if output.finished:
                        return output
            finally:
                self._seeds.pop(name, None)
            raise RunError(f"{self.name}: a request ended without an output")

        return await self._call(last())

    async def _call(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call to vLLM.

        Raises:
            EngineLostError: the engine died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await call
        except EngineDeadError as e:
            if self._llm is None:
                raise RunError(f"{self.name}: it was closed") from e
            raise EngineLostError(f"{self.name}: its vLLM process {self._output.died()}") from e
