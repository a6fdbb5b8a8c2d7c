"""Stages of a flow: pools of actors, each of which works on batches of rows."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from speechdistill.engine import cluster
from speechdistill.engine.isolate import CannotWork, Isolated, Row, Worker
from speechdistill.engine.monitor import Board
from speechdistill.engine.pools import Pool
from speechdistill.engine.shards import REJECT
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


class Actor:
    """Actor of a stage. A row that fails becomes a reject; a batch that fails as a whole is retried row by row."""

    def __init__(self, stage: Stage, schema: pa.Schema, board: Board) -> None:
        self._stage, self._schema, self._board = stage, schema, board
        cluster.be_patient()
        cluster.node_use()  # the first answer covers no time
        isolated = partial(Isolated, stage.make, stage.memory_gb, calls=stage.calls)
        self._work: Worker = isolated() if stage.isolated else stage.make()
        self._lock, self._noted = threading.Lock(), (0.0, 0.0)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        live = [row for row in rows if row["reject_stage"] is None]
        began = time.monotonic(), self._cpu_s()
        results = self._results(live)
        self._note(len(rows), *began)
        for row, result in zip(live, results, strict=True):
            if isinstance(result, Exception):
                reason = (self._stage.name, type(result).__name__, str(result))
                row.update(zip(REJECT.names, reason, strict=True))
            else:
                row.update(result)
        return pa.Table.from_pylist(rows, self._schema)

    def _results(self, rows: list[Row]) -> list[Row | Exception]:
        if not rows:
            return []
        try:
            return self._work(rows)
        except CannotWork:  # ends the run, since every row would fail
            raise
        except Exception as error:
            return [error] if len(rows) == 1 else [self._results([row])[0] for row in rows]

    def _note(self, rows: int, began: float, cpu_began: float) -> None:
        """Add the work to the board. Time that batches share is counted once."""
        with self._lock:
            now, cpu_s = time.monotonic(), self._cpu_s()
            since, cpu_since = (max(pair) for pair in zip(self._noted, (began, cpu_began), strict=True))
            self._board.note(self._stage.name, rows, now - since, cpu_s - cpu_since)
            self._noted = now, cpu_s
            self._board.note_use()

    def _cpu_s(self) -> float:
        return time.process_time() + getattr(self._work, "cpu_s", 0.0)
