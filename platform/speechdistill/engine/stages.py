"""Stages of a flow: pools of actors, each of which works on batches of rows (`actor.py`). No import of ray."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from speechdistill.engine.isolate import Worker
from speechdistill.engine.pools import Pool
from speechdistill.io.errors import RunError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pool of actors. The worker that `make()` returns maps each row to the columns `adds`, or to an exception.

    `isolated` runs the worker in a child process of the actor, with at most `memory_gb`, for code that may crash.
    `calls` is the number of batches that an actor works on at once, each in a thread: the next ones are decoded while
    one waits for a GPU.
    """

    name: str
    make: Callable[[], Worker]
    adds: pa.Schema
    pool: Pool = Pool()
    batch_rows: int = 8
    isolated: bool = False
    memory_gb: float | None = None
    calls: int = 1


def check_pools(stages: tuple[Stage, ...], cpus: float, gpus: float) -> None:
    """Raise `RunError` for pools that would wait for ever. Ray Data's own tasks need one CPU beside the actors."""
    wanted_cpus = sum(stage.pool.actors * stage.pool.num_cpus for stage in stages)
    wanted_gpus = sum(stage.pool.actors * stage.pool.num_gpus for stage in stages)
    pools = ", ".join(f"{s.name} {s.pool.actors} × {s.pool.num_cpus:g} CPU + {s.pool.num_gpus:g} GPU" for s in stages)
    if any(stage.pool.actors < 1 or stage.pool.num_cpus <= 0 or stage.pool.num_gpus < 0 for stage in stages):
        raise RunError(
            f"a pool without an actor or a share of a CPU ({pools})", "give every pool at least one and a share"
        )
    if wanted_cpus > cpus - 1 + 1e-6:
        raise RunError(
            f"the actor pools ({pools}) want {wanted_cpus:g} CPUs, but only {cpus - 1:g} of the cluster's {cpus:g} "
            "are free for actors (one is for reading and writing)",
            "lower the numbers of actors or their CPUs, or give --grow-to if the cluster can grow",
        )
    if wanted_gpus > gpus + 1e-6:
        raise RunError(
            f"the actor pools ({pools}) want {wanted_gpus:g} GPUs, but the cluster has {gpus:g}",
            "lower the number of actors, give each a fraction of a GPU, or give --grow-to if the cluster can grow",
        )
