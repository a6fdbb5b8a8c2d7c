"""The footers of a run's parts, gathered in one file: on S3, 100,000 requests take half an hour."""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.io import storage, table
from speechdistill.io.errors import RunError, TableError

_THREADS, _TAIL_BYTES = 32, 1 << 16  # most footers have 10 kB
_SAVED = 1000  # reading so many footers is quick


class File(NamedTuple):
    """The file of a committed part: number of the part, number of ids, size, name on its file system."""

    part: int
    ids: int
    size_bytes: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A committed part: how many ids it has, how many of them were labelled, and which were rejected.

    `rejects` are rows of schema `reject.v1`, `totals` the sums of `Layout.totals`. `run` is the fingerprint of the
    run's identity, empty in parts of earlier versions. `size_bytes` is 0 if the footer was read from its file.
    """

    number: int
    num_ids: int
    labelled: int
    rejects: tuple[Mapping[str, str], ...]
    totals: Mapping[str, Any]
    content_sha256: str
    run: str = ""
    size_bytes: int = 0

    def to_json(self) -> str:
        """Return the text that files hold; `run` and `size_bytes` are left out if they are not known."""
        known = {
            "part": self.number,
            "ids": self.num_ids,
            "labelled": self.labelled,
            "rejects": self.rejects,
            "totals": self.totals,
            "content_sha256": self.content_sha256,
        }
        added = {"run": self.run, "size_bytes": self.size_bytes}
        return json.dumps({**known, **{key: value for key, value in added.items() if value}})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Part":
        """Return the part of a footer's text; raises `KeyError` if a value is missing."""
        values = json.loads(text)
        return cls(
            number=values["part"],
            num_ids=values["ids"],
            labelled=values["labelled"],
            rejects=tuple(values["rejects"]),
            totals=values["totals"],
            content_sha256=values["content_sha256"],
            run=values.get("run", ""),
            size_bytes=values.get("size_bytes", 0),
        )


class Footers:
    """The known footers of the parts in `out`, from `footers.parquet` there and from `note`.

    A known footer is used for a file with the same number of ids and the same size. Others are read, with one request
    each.
    """

    def __init__(self, out: str) -> None:
        self._out, self._unsaved = out, 0
        self._known: dict[int, tuple[int, int, str]] = {}
        with suppress(TableError):  # missing or damaged: the parts have all of it
            rows = table.read(f"{out}/footers.parquet", "footer.v1")
            columns = (rows[name].to_pylist() for name in ("part", "ids", "size_bytes", "footer"))
            parts, *known = columns
            self._known = dict(zip(parts, zip(*known, strict=True), strict=True))

    def note(self, part: Part) -> None:
        """Add a part that was committed just now, with its `size_bytes`."""
        self._add(File(part.number, part.num_ids, part.size_bytes, ""), part.to_json())

    def of(self, files: Sequence[File]) -> Iterator[Part]:
        """Yield the footers of these files in order; raises `RunError` for a damaged file."""
        unknown = [file for file in files if not self._has(file)]
        fs, _ = storage.file_system(self._out)
        with ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(unknown), _SAVED):  # saved in steps, for the case that this process ends
                some = unknown[start : start + _SAVED]
                for file, text in zip(some, threads.map(lambda file: _read(fs, self._out, file), some), strict=True):
                    self._add(file, text)
        return (Part.from_json(self._known[file.part][2]) for file in files)

    def _has(self, file: File) -> bool:
        ids, size_bytes, _ = self._known.get(file.part, (0, 0, ""))
        return (ids, size_bytes) == (file.ids, file.size_bytes)

    def _add(self, file: File, text: str) -> None:
        self._known[file.part] = (file.ids, file.size_bytes, text)
        self._unsaved += 1
        if self._unsaved >= max(_SAVED, len(self._known) // 20):  # at most twenty times in all
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
