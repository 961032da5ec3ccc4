"""Weights from the trainer to the engines, through vLLM's weight-transfer interfaces.

    trainer ranks                                  engine workers
    WeightPusher -> (vLLM) TrainerWeightTransferEngine ==transport==> (vLLM) WeightTransferEngine -> model.load_weights
         |-> client: EngineFanOut -> each engine's init / start / update / finish

Importing vLLM's interfaces costs seconds, so modules that need them at import (`gloo`, `worker`) are imported late.
"""
