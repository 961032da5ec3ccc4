"""The trajectories of a step that are shown: chosen by their rewards, then fetched and written."""

from __future__ import annotations

from stare_megatron.cluster import runtime
from stare_megatron.cluster.trainers import TrainerGroup
from stare_megatron.config import Config
from stare_megatron.metrics.sample_records import write_sample_records
from stare_megatron.metrics.samples import FOLDER, Decode, choose, excerpt, pick, write_samples
from stare_megatron.rollout.collect import Collected


def write(config: Config, step: int, batch: Collected[runtime.Ref], trainers: TrainerGroup, decode: Decode) -> str:
    """Write `logging.samples` trajectories, as text and as data with what the update knew of their tokens.

    Returns one of them in one line.
    """
    folder, size = config.folder / FOLDER, config.rollout.group_size
    places = choose([summary for _, summary in batch.groups], config.logging.samples, step)
    wanted = sorted({group for group, _ in places})
    groups = dict(zip(wanted, runtime.fetch([batch.groups[i][0] for i in wanted]), strict=True))
    picked = pick(groups, places)
    write_samples(folder, step, picked, len(batch.groups) * size, batch.stats.groups_sampled * size, decode)
    write_sample_records(folder, step, picked, trainers.token_records(places), decode)
    return excerpt(picked[step % len(picked)], decode)
