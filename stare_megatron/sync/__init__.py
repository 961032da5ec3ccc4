"""Weights from the trainer to the engines, through vLLM's weight-transfer interfaces.

    trainer ranks                                  engine workers
    WeightPusher -> (vLLM) TrainerWeightTransferEngine ==transport==> (vLLM) WeightTransferEngine -> model.load_weights
         |-> client: EngineFanOut -> each engine's init / start / update / finish

Whole tensors travel so. Sharded pushes have vLLM's interface on the engines' side only:

    each rank's boxes -> plan.plan <- bake.bake: each worker's needs        once for an engine
    sharded.ShardedPusher ==link== sharded_engine -> load.Loader            each push

Importing vLLM's interfaces costs seconds, so modules that need them at import (`gloo`, `worker`) are imported late.
"""
