"""A finished label run as an index of row groups, for training and comparing."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.engine.shards import ROW_GROUP
from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import TableError, UserError

_AGAIN = "delete the file and rerun pseudolabel, which makes it again"
_HELD_OUT = 20  # one row group of so many is not trained on where validation needs it


class LabelRun:
    """The row groups of a finished label run, from its `manifest.parquet` alone.

    Raises `TableError` where it is not finished or has no rows.
    """

    def __init__(self, place: str) -> None:
        self.out, self.weight = _weighted(place)
        identity = storage.read_json(f"{self.out}/run.json")
        if identity is None or storage.read_json(f"{self.out}/summary.json") is None:
            raise TableError(f"{self.out}: not a complete label run (no summary.json)", "finish it first")
        self.configuration: dict[str, Any] = identity["configuration"]
        files = table.read(f"{self.out}/manifest.parquet", "shard.v1")
        self.paths: list[str] = files["path"].to_pylist()
        rows = files["rows"].to_numpy()
        counts = -(-rows // ROW_GROUP)
        self.file = np.repeat(np.arange(len(rows)), counts)
        self.in_file = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        self.sizes = np.minimum(ROW_GROUP, rows[self.file] - self.in_file * ROW_GROUP)
        if not len(self.sizes):
            raise TableError(f"{self.out}: no labelled samples", "give a label run that has some")
        # Of the files' hashes, so that equal labels are equal data wherever they lie.
        self.fingerprint = fingerprint.of(files["content_sha256"].to_pylist())

    def held_out(self) -> np.ndarray:
        """Numbers of the row groups kept for validation, evenly spaced: at least one, and never all."""
        count = min(max(1, len(self.sizes) // _HELD_OUT), len(self.sizes) - 1)
        return np.unique(np.linspace(0, len(self.sizes) - 1, count + 2).astype(np.int64)[1:-1])

    def read_group(self, group: int, *more: str) -> pa.Table:
        """The rows of a group, with what training reads of them and the columns `more`."""
        path = f"{self.out}/{self.paths[self.file[group]]}"
        columns = ["sample_id", "audio", "audio_format", "num_samples", "score", *more]
        try:
            with table.open_parquet(path) as file:
                rows = pq.ParquetFile(file).read_row_group(int(self.in_file[group]), columns)
        except (FileNotFoundError, pa.ArrowException) as error:
            raise TableError(f"{path} was lost or damaged since it was labelled: {error}", _AGAIN) from error
        if len(rows) != self.sizes[group]:
            raise TableError(f"{path}: row group {self.in_file[group]} has {len(rows)} rows: it was rewritten", _AGAIN)
        return rows


def _weighted(place: str) -> tuple[str, float]:
    out, found, weight = place.rpartition("=")
    if not found:
        return storage.absolute(place), 1.0
    try:
        value = float(weight)
    except ValueError:
        return storage.absolute(place), 1.0  # a folder's name may have the sign
    if not 0 < value < float("inf"):
        raise UserError(f"--shards {place}: the weight is {value:g}", "give a number above 0")
    return storage.absolute(out), value
