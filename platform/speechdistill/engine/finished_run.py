"""The files of a finished run as an index of row groups, for training and comparing.

The place of a sample is its number in the order of the row groups.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
_FOOTERS = 4096  # kept at most
_SILENT_S = 5.0  # before a progress line
_AHEAD_BYTES = 1 << 16  # of storage: the audio or features beside small columns are not read


class RowGroups:
    """The row groups of all files in a run's `manifest.parquet`, in order.

    Arrays with one value per row group: `file` (an index into `paths`), `in_file` (its number there), `sizes` (rows)
    and `starts` (the place of the first row). `fingerprint` is that of the files' contents, wherever they lie. `again`
    is the fix for a file that is lost. With `keeps_footers` the footers of files are read and checked once.
    """

    def __init__(self, out: str, rows_per_group: int, again: str, keeps_footers: bool = False) -> None:
        self._out, self._again = out, again
        files = table.read(f"{out}/manifest.parquet", "shard.v1")
        self.paths: list[str] = files["path"].to_pylist()
        hashes: list[str] = files["content_sha256"].to_pylist()
        self.fingerprint = fingerprint.of(hashes)
        self._hashes = dict(zip(self.paths, hashes, strict=True))
        rows = files["rows"].to_numpy()
        counts = -(-rows // rows_per_group)
        self.file = np.repeat(np.arange(len(rows)), counts)
        self.in_file = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        self.sizes = np.minimum(rows_per_group, rows[self.file] - self.in_file * rows_per_group)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self._footers: dict[str, pq.FileMetaData] = {}
        self._most_footers = _FOOTERS if keeps_footers else 0

    def __len__(self) -> int:
        return len(self.sizes)

    def address(self, group: int, row: int) -> str:
        """Return a URI of a row: its file, `#`, its row group there, `.` and its number in the group."""
        return f"{self._out}/{self.paths[self.file[group]]}#{self.in_file[group]}.{row}"

    def read(self, group: int, columns: Sequence[str], ahead_bytes: int | None = None) -> pa.Table:
        """Return columns of a row group; raises `TableError` for a file that is lost, damaged or not the manifest's."""
        with self._opened(self.paths[self.file[group]], ahead_bytes) as file:
            return file.read_row_group(int(self.in_file[group]), list(columns))

    def columns(self, *names: str) -> pa.Table:
        """Return columns of all rows in the order of their places; raises `TableError` as `read` does."""
        with ThreadPoolExecutor(_THREADS) as threads:
            shown: dict[str, Any] = {"total": len(self.paths), "unit": "file", "dynamic_ncols": True}
            read = threads.map(lambda path: self._columns(names, path), self.paths)
            parts = list(tqdm(read, delay=_SILENT_S, desc="clips", **shown))
        if sum(map(len, parts)) != self.sizes.sum():
            raise TableError(f"{self._out}: its shards have other rows than its manifest", self._again)
        return pa.concat_tables(parts) if parts else pa.table({name: [] for name in names})

    def _columns(self, names: Sequence[str], path: str) -> pa.Table:
        with self._opened(path, _AHEAD_BYTES) as file:
            return file.read(list(names))

    @contextmanager
    def _opened(self, path: str, ahead_bytes: int | None) -> Iterator[pq.ParquetFile]:
        place = f"{self._out}/{path}"
        try:
            with table.open_parquet(place, ahead_bytes) as opened:
                file = pq.ParquetFile(opened, metadata=self._footers.get(path))
                if path not in self._footers:
                    self._check(path, file.metadata)
                if len(self._footers) < self._most_footers:
                    self._footers[path] = file.metadata
                yield file
        except (FileNotFoundError, pa.ArrowException) as error:
            raise TableError(f"{place} was lost or damaged since it was written: {error}", self._again) from error

    def _check(self, path: str, footer: pq.FileMetaData) -> None:
        """Raise `TableError` for a part that was made again since (more samples, rejects that were retried).

        Other samples have its places by now: held-out ones would train.
        """
        text = (footer.metadata or {}).get(b"part")
        if text is None or json.loads(text).get("content_sha256") != self._hashes[path]:
            raise TableError(f"{self._out}/{path} is not the file that the run's manifest lists", self._again)


class LabelRun:
    """A finished label run, known from its `manifest.parquet` alone.

    Raises `TableError` if the run is not finished or has no rows.
    """

    def __init__(self, place: str) -> None:
        self.out, self.weight = _weighted(place)
        above = self.out.rpartition("/")[0]
        if storage.read_json(f"{above}/run.json") and not storage.read_json(f"{self.out}/run.json"):
            raise TableError(f"{self.out} is a folder inside the run {above}", f"give {above}")
        identity = configuration(self.out)
        if identity is None or completed(self.out) is None:
            raise TableError(
                f"{self.out}: not a complete label run (no summary.json)", "rerun its command until it is complete"
            )
        self.configuration = identity
        self.groups = RowGroups(self.out, ROW_GROUP, _AGAIN)
        if not len(self.groups):
            raise TableError(f"{self.out}: no labelled samples", "give a label run that has some")
        self.fingerprint = self.groups.fingerprint

    def read_group(self, group: int, *more: str) -> pa.Table:
        """Return the rows of a group: the columns that training needs, and the columns `more`."""
        return self.groups.read(group, ["sample_id", "audio", "audio_format", "num_samples", "score", *more])

    def read(self, places: np.ndarray, *more: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the row group and the row of each sample at sorted places.

        Rows have the columns of `read_group`, and their number in the group as `row`.
        """
        groups = np.searchsorted(self.groups.starts, places, side="right") - 1
        for group in np.unique(groups).tolist():
            numbers = places[groups == group] - self.groups.starts[group]
            rows = self.read_group(group, *more).take(numbers).to_pylist()
            yield from ((group, {**row, "row": number}) for row, number in zip(rows, numbers.tolist(), strict=True))


def _weighted(place: str) -> tuple[str, float]:
    """Return the folder and the weight of `DIR=0.3`; the weight is 1 by default."""
    out, sign, weight = place.rpartition("=")
    if not sign:
        return storage.absolute(place), 1.0
    try:
        value = float(weight)
    except ValueError:
        return storage.absolute(place), 1.0  # a folder's name may have the sign
    if not 0 < value < float("inf"):
        raise UserError(f"--shards {place}: the weight is {value:g}", "give a number above 0")
    return storage.absolute(out), value
