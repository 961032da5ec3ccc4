"""Entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes."""

from __future__ import annotations

import os
import threading
import time

from stare_megatron.host.stacks import write_stacks_on_signal
from stare_megatron.sync import cpu_sampling

PARENT = "STARE_ENGINE_PARENT"
"""Environment variable with the process id of an `Engine`'s process, for the processes vLLM starts from it."""


def register() -> None:
    """Make the backends `gloo`, `cuda_ipc` and `sharded` known to vLLM's weight-transfer factories. Repeated calls do
    nothing.

    In a process that one of our engines started, also have SIGUSR1 write the stacks of its threads, and mend what vLLM
    checks drafts with on CPUs; in the engine core see to it that it ends with its parent: vLLM's survives when that is
    killed.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if "gloo" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("gloo", "stare_megatron.sync.gloo", "GlooWeightTransferEngine")
    if "cuda_ipc" not in WeightTransferEngineFactory._registry:
        # The trainer's side is vLLM's; `push.Client` writes its handles as this one reads them.
        WeightTransferEngineFactory.register_engine(
            "cuda_ipc", "stare_megatron.sync.ipc", "CudaIpcWeightTransferEngine"
        )
    if "sharded" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            "sharded", "stare_megatron.sync.sharded_engine", "ShardedWeightTransferEngine"
        )
    if PARENT in os.environ:
        write_stacks_on_signal()
        cpu_sampling.mend()
    if os.environ.get(PARENT) == str(os.getppid()):
        threading.Thread(target=_end_with, args=(os.getppid(),), name="end-with-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
