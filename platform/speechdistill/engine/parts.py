"""Data source of Ray Data: the ids of a run's parts."""

from functools import partial
from typing import Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from speechdistill.engine.shards import REJECT, Layout


class Parts(Datasource):  # type: ignore[misc]
    """One read task for each part in `numbers`. A task yields one block: the part's ids and empty status columns."""

    def __init__(self, layout: Layout, numbers: list[int]) -> None:
        super().__init__()
        self._layout, self._numbers = layout, numbers

    def estimate_inmemory_data_size(self) -> int:
        return 8 * self._layout.rows_per_part * len(self._numbers)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        return [self._task(self._layout.ids(k)) for k in self._numbers]

    def _task(self, ids: range) -> ReadTask:
        about = BlockMetadata(num_rows=len(ids), size_bytes=8 * len(ids), input_files=None, exec_stats=None)
        return ReadTask(partial(_blocks, ids), about)


def block(ids: range) -> pa.Table:
    nulls = [pa.nulls(len(ids), field.type) for field in REJECT]
    return pa.Table.from_arrays([pa.array(ids, pa.int64()), *nulls], names=["id", *REJECT.names])


def _blocks(ids: range) -> list[pa.Table]:
    return [block(ids)]
