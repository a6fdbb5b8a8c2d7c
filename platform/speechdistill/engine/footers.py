"""The footers of a run's parts, gathered in one file: a request for each of 100,000 parts takes half an hour on S3."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.io import storage, table
from speechdistill.io.errors import RunError, TableError

_THREADS, _TAIL_BYTES = 32, 1 << 16  # most footers have 10 kB
_SAVED = 1000  # a smaller run, and as many parts of a larger one, are read quickly


class File(NamedTuple):
    """A committed part: its number, how many ids it has, the bytes of its file and its name on its file system."""

    part: int
    ids: int
    size_bytes: int
    name: str


class Footers:
    """The known footers of the parts in `out`, from `footers.parquet` there and from `note`.

    A footer is that of a file with as many ids and bytes; of others it is read, with one request.
    """

    def __init__(self, out: str) -> None:
        self._out, self._unsaved = out, 0
        self._known: dict[int, tuple[int, int, str]] = {}
        with suppress(TableError):  # not there, or damaged: it has nothing that the parts lack
            rows = table.read(f"{out}/footers.parquet", "footer.v1")
            columns = (rows[name].to_pylist() for name in ("part", "ids", "size_bytes", "footer"))
            parts, *known = columns
            self._known = dict(zip(parts, zip(*known, strict=True), strict=True))

    def note(self, footer: Mapping[str, Any]) -> None:
        """Take the footer of a part that was committed just now, with its `size_bytes`."""
        self._add(File(footer["part"], footer["ids"], footer["size_bytes"], ""), json.dumps(footer))

    def of(self, files: Sequence[File]) -> Iterator[dict[str, Any]]:
        """The footers of these files, in their order; raises `RunError` for a file that is damaged."""
        unknown = [file for file in files if not self._has(file)]
        fs, _ = storage.file_system(self._out)
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(unknown), _SAVED):  # so many are kept if this process ends
                some = unknown[start : start + _SAVED]
                for file, text in zip(some, threads.map(lambda file: _read(fs, self._out, file), some), strict=True):
                    self._add(file, text)
        return (json.loads(self._known[file.part][2]) for file in files)

    def _has(self, file: File) -> bool:
        ids, size_bytes, _ = self._known.get(file.part, (0, 0, ""))
        return (ids, size_bytes) == (file.ids, file.size_bytes)

    def _add(self, file: File, text: str) -> None:
        self._known[file.part] = (file.ids, file.size_bytes, text)
        self._unsaved += 1
        if self._unsaved >= max(_SAVED, len(self._known) // 20):  # in all they are written twenty times at most
            self._save()

    def _save(self) -> None:
        ids, sizes, texts = zip(*self._known.values(), strict=True)
        columns = {"part": list(self._known), "ids": ids, "size_bytes": sizes, "footer": texts}
        rows = table.validate(pa.table(columns), "footer.v1")
        storage.publish(table.parquet_bytes(rows), f"{self._out}/footers.parquet")
        self._unsaved = 0


def _read(fs: Any, out: str, file: File) -> str:
    path = f"{out}/shards/{file.name.rsplit('/', 1)[1]}"
    try:
        with storage.access(path):
            tail = fs.cat_file(file.name, start=max(0, file.size_bytes - _TAIL_BYTES), end=file.size_bytes)
            if int.from_bytes(tail[-8:-4], "little") + 8 > len(tail):
                tail = fs.cat_file(file.name)
        return str(pq.read_metadata(pa.BufferReader(tail)).metadata[b"part"], "utf-8")
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error})", "delete it and rerun the command") from error
