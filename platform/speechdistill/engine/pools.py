"""Actor pools of a job on the engine: the user's settings, and sizes that fit a cluster's CPUs and GPUs."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from speechdistill.engine import place
from speechdistill.io.audio import MIN_DURATION_S
from speechdistill.io.options import at_least


@dataclass(frozen=True, kw_only=True)
class Pools:
    """Actor pools. Each default fits the cluster."""

    degrade_actors: int | None = None
    """CPU actors that degrade. Default: as many as fit the cluster."""
    network_actors: int | None = None
    """Actors that run the recipe's networks, each all of them. Default: one per GPU, or per CPU without GPUs."""
    teach_actors: int | None = None
    """Actors that run the teacher. Default: one per GPU, or per CPU without GPUs."""
    teach_gpus: float | None = None
    """GPUs per teacher actor, such as 0.5. Default: 1 if the cluster has a GPU, shared equally with a recipe's
    networks, else 0."""
    batch_s: float | None = None
    """Seconds of audio in a batch of a teacher actor. Default: 8 segments, on a GPU 64."""
    grow_to: str | None = None
    """Size that a cluster with autoscaling may grow to, such as cpu=320,gpu=8: the pools are sized for it. Default: the
    nodes it has now."""

    def __post_init__(self) -> None:
        at_least(self, degrade_actors=1, network_actors=1, teach_actors=1, teach_gpus=0, batch_s=MIN_DURATION_S)
        place.grown(self.grow_to)


class Pool(NamedTuple):
    """Actors of a stage, and the CPUs and GPUs of each: Ray's, which may be fractions."""

    actors: int = 1
    num_cpus: float = 0.25
    num_gpus: float = 0.0


class Sizes(NamedTuple):
    """Pools of a job; `later` is each pool that degrades after networks."""

    degrade: Pool
    later: Pool
    network: Pool
    teach: Pool


def sized(wanted: Pools, passes: int, cpus: float, gpus: float) -> Sizes:
    """Return the pools of a recipe whose samples go to networks `passes` times; one CPU is left to Ray Data's tasks."""
    free = max(0.5, cpus - 1)
    heavy_gpus = (1.0 if gpus else 0.0) if wanted.teach_gpus is None else wanted.teach_gpus
    if not gpus or not heavy_gpus:
        return _on_cpus(wanted, passes, cpus, free, heavy_gpus)
    teach = wanted.teach_actors or max(1, int(gpus if passes else gpus / heavy_gpus))
    network = wanted.network_actors or max(1, int(gpus))
    heavy = teach + passes * network
    if passes:  # equal shares, so that every GPU has room for the same number of actors
        heavy_gpus = int(1e4 / math.ceil(heavy / max(1.0, gpus))) / 1e4
    heavy_cpus = min(0.25, 0.25 * free / heavy)
    rest = free - heavy * heavy_cpus
    later = wanted.degrade_actors or max(1, int(rest) // 4)  # most samples only need to be stored by then
    degrade = wanted.degrade_actors or max(1, int(rest) - passes * later)
    # Less than a whole CPU: these actors could otherwise fill a GPU's node before its teacher starts.
    degrade_cpus = min(0.9, rest / (degrade + passes * later))
    return Sizes(
        Pool(degrade, degrade_cpus),
        Pool(later, degrade_cpus),
        Pool(network, heavy_cpus, heavy_gpus),
        Pool(teach, heavy_cpus, heavy_gpus),
    )


def _on_cpus(wanted: Pools, passes: int, cpus: float, free: float, heavy_gpus: float) -> Sizes:
    """Return pools for a recipe on CPUs. Without networks the teacher takes nine tenths of the time.

    (For 7.68 s of audio: teacher 0.16 s, degradation 0.015 s.)
    """
    teach = wanted.teach_actors or max(1, int(cpus))
    network = wanted.network_actors or max(1, int(cpus))
    degrade = wanted.degrade_actors or max(1, int(cpus) // 4)
    degraders = degrade * (1 + passes)
    # Small, so that a degrading actor fits beside the teachers if its node is lost.
    degrading = Pool(degrade, min(0.25, 0.25 * free / degraders))
    heavy_cpus = min(1.0, (free - degraders * degrading.num_cpus) / (teach + passes * network))
    return Sizes(degrading, degrading, Pool(network, heavy_cpus, heavy_gpus), Pool(teach, heavy_cpus, heavy_gpus))
