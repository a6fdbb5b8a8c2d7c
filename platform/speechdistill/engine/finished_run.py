"""A finished label run as an index of row groups, for training and comparing.

The place of a sample is its number in the order of the row groups.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from speechdistill.engine.shards import ROW_GROUP, completed, configuration
from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import TableError, UserError

_AGAIN = "delete the file and rerun pseudolabel, which makes it again"
_THREADS = 32
_SILENT_S = 5.0  # before a progress line
_AHEAD_BYTES = 1 << 16  # of storage: the audio beside small columns is not read


class LabelRun:
    """The row groups of a finished label run, from its `manifest.parquet` alone.

    Raises `TableError` where it is not finished or has no rows.
    """

    def __init__(self, place: str) -> None:
        self.out, self.weight = _weighted(place)
        above = self.out.rpartition("/")[0]
        if storage.read_json(f"{above}/run.json") and not storage.read_json(f"{self.out}/run.json"):
            raise TableError(f"{self.out} is a folder inside the run {above}", f"give {above}")
        identity = configuration(self.out)
        if identity is None or completed(self.out) is None:
            raise TableError(f"{self.out}: not a complete label run (no summary.json)", "finish it first")
        self.configuration = identity
        files = table.read(f"{self.out}/manifest.parquet", "shard.v1")
        self.paths: list[str] = files["path"].to_pylist()
        self._hashes = dict(zip(self.paths, files["content_sha256"].to_pylist(), strict=True))
        rows = files["rows"].to_numpy()
        counts = -(-rows // ROW_GROUP)
        self.file = np.repeat(np.arange(len(rows)), counts)
        self.in_file = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        self.sizes = np.minimum(ROW_GROUP, rows[self.file] - self.in_file * ROW_GROUP)
        self.starts = np.cumsum(self.sizes) - self.sizes
        if not len(self.sizes):
            raise TableError(f"{self.out}: no labelled samples", "give a label run that has some")
        # Of the files' hashes, so that equal labels are equal data wherever they lie.
        self.fingerprint = fingerprint.of(files["content_sha256"].to_pylist())

    def read_group(self, group: int, *more: str) -> pa.Table:
        """The rows of a group, with what training reads of them and the columns `more`."""
        path = self.paths[self.file[group]]
        columns = ["sample_id", "audio", "audio_format", "num_samples", "score", *more]
        with self._opened(path) as file:
            return file.read_row_group(int(self.in_file[group]), columns)

    def read(self, places: np.ndarray, *more: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The row group and the row (as `read_group` has it, with its number `row`) of each sample at sorted places."""
        groups = np.searchsorted(self.starts, places, side="right") - 1
        for group in np.unique(groups).tolist():
            numbers = places[groups == group] - self.starts[group]
            rows = self.read_group(group, *more).take(numbers).to_pylist()
            yield from ((group, {**row, "row": number}) for row, number in zip(rows, numbers.tolist(), strict=True))

    def columns(self, *names: str) -> pa.Table:
        """Columns of all samples in the order of their places."""
        with ThreadPoolExecutor(_THREADS) as threads:
            told = {"total": len(self.paths), "unit": "file", "desc": "clips of labels", "dynamic_ncols": True}
            parts = list(tqdm(threads.map(partial(self._columns, names), self.paths), delay=_SILENT_S, **told))
        if sum(map(len, parts)) != self.sizes.sum():
            raise TableError(f"{self.out}: its shards have other rows than its manifest", _AGAIN)
        return pa.concat_tables(parts)

    def _columns(self, names: tuple[str, ...], path: str) -> pa.Table:
        with self._opened(path, _AHEAD_BYTES) as file:
            return file.read(list(names))

    @contextmanager
    def _opened(self, path: str, ahead_bytes: int | None = None) -> Iterator[pq.ParquetFile]:
        """A shard of the manifest; raises `TableError` if it is lost, damaged or another than the manifest lists.

        A part that was made again since (more samples, rejects that were retried) has other samples in its places, so
        that held-out ones would train.
        """
        place = f"{self.out}/{path}"
        try:
            with table.open_parquet(place, *filter(None, [ahead_bytes])) as opened:
                file = pq.ParquetFile(opened)
                footer = (file.metadata.metadata or {}).get(b"part")
                if footer is None or json.loads(footer).get("content_sha256") != self._hashes[path]:
                    raise TableError(f"{place} is not the file that the run's manifest lists", _AGAIN)
                yield file
        except (FileNotFoundError, pa.ArrowException) as error:
            raise _lost(place, error) from error


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


def _lost(path: str, error: Exception) -> TableError:
    return TableError(f"{path} was lost or damaged since it was labelled: {error}", _AGAIN)
