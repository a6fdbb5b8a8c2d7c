# engine/: Ray Data: the cluster, a flow of actor stages, the commit protocol of shards, cost.
"""The actor of a stage: batches of rows to results, with rejects for rows that fail."""

import threading
import time
from functools import partial

import pyarrow as pa

from speechdistill.engine import cluster
from speechdistill.engine.isolate import CannotWork, Isolated, Row, Worker
from speechdistill.engine.monitor import Board
from speechdistill.engine.shards import REJECT
from speechdistill.engine.stages import Stage


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
