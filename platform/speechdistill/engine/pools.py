"""How many actors the labelling job takes of a cluster's CPUs and GPUs."""

import math
from typing import NamedTuple


class Wanted(NamedTuple):
    """What the user has set: numbers of actors, and GPUs per teacher actor."""

    degrade: int | None = None
    network: int | None = None
    teach: int | None = None
    teach_gpus: float | None = None


class Sizes(NamedTuple):
    """Numbers of actors, `later` of each pool that degrades after networks, and what each actor takes.

    `heavy` are those of the teacher and the networks.
    """

    degrade: int
    later: int
    network: int
    teach: int
    degrade_cpus: float
    heavy_cpus: float
    heavy_gpus: float


def sized(wanted: Wanted, passes: int, cpus: float, gpus: float) -> Sizes:
    """The pools of a recipe whose samples go to networks `passes` times; one CPU is left to Ray Data's own tasks."""
    free = max(0.5, cpus - 1)
    heavy_gpus = (1.0 if gpus else 0.0) if wanted.teach_gpus is None else wanted.teach_gpus
    if not gpus or not heavy_gpus:
        return _on_cpus(wanted, passes, cpus, free, heavy_gpus)
    teach = wanted.teach or max(1, int(gpus if passes else gpus / heavy_gpus))
    network = wanted.network or max(1, int(gpus))
    heavy = teach + passes * network
    if passes:  # equal shares, so that every GPU has room for as many: none is left over in crumbs
        heavy_gpus = int(1e4 / math.ceil(heavy / max(1.0, gpus))) / 1e4
    heavy_cpus = min(0.25, 0.25 * free / heavy)
    rest = free - heavy * heavy_cpus
    later = wanted.degrade or max(1, int(rest) // 4)  # most samples have nothing left then but to be stored
    degrade = wanted.degrade or max(1, int(rest) - passes * later)
    # Not a whole CPU, or they could fill a GPU's node to the brim before its teacher comes.
    degrade_cpus = min(0.9, rest / (degrade + passes * later))
    return Sizes(degrade, later, network, teach, degrade_cpus, heavy_cpus, heavy_gpus)


def _on_cpus(wanted: Wanted, passes: int, cpus: float, free: float, heavy_gpus: float) -> Sizes:
    """The teacher takes nine tenths of the time without networks (7.68 s: 0.16 s, degrading them: 0.015 s)."""
    teach = wanted.teach or max(1, int(cpus))
    network = wanted.network or max(1, int(cpus))
    degrade = wanted.degrade or max(1, int(cpus) // 4)
    degraders = degrade * (1 + passes)
    # Small, so that one finds room beside the teachers when its node is lost.
    degrade_cpus = min(0.25, 0.25 * free / degraders)
    heavy_cpus = min(1.0, (free - degraders * degrade_cpus) / (teach + passes * network))
    return Sizes(degrade, degrade, network, teach, degrade_cpus, heavy_cpus, heavy_gpus)
