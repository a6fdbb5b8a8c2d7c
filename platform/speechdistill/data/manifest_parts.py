"""The output folder of ingest: parts of good and rejected rows, committed one by one, and their merged manifest.

If several parts have a clip, the last one counts.
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import groupby, islice
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.data.clips import clip_id
from speechdistill.data.headers import Probed
from speechdistill.data.listed import Row
from speechdistill.io import storage, table

_CHUNK_ROWS = 2_000
_KNOWN_ROWS = 50_000  # known clips sorted by part at a time, so that parts are read rarely
_LISTED_ROWS = 500
_PART = re.compile(r"(clips|rejects)-(\d{6})\.parquet")


def merge(out: str) -> dict[str, Any]:
    """Write `clips.parquet` and `rejects.parquet` from all parts; returns their totals."""
    clips: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    known = _known(out)

    def good() -> Iterator[pa.Table]:
        for number, path in _parts(out, "clips"):
            rows = table.read(path, "clip.v1")
            rows = rows.filter(pa.array(known.parts_of(_ids(rows["clip_id"])) == number))
            for kind, duration_s in zip(rows["kind"].to_pylist(), rows["duration_s"].to_pylist(), strict=True):
                clips[kind] += 1
                seconds[kind] += duration_s
            yield rows

    table.publish_stream(good(), "clip.v1", f"{out}/clips.parquet")
    rejects = _last_rejects(out, known)
    storage.publish(table.parquet_bytes(table.from_rows(rejects, "reject.v1")), f"{out}/rejects.parquet")
    return {
        "clips": dict(clips),
        "hours": {kind: value / 3600 for kind, value in seconds.items()},
        "rejected": len(rejects),
        "manifest": f"{out}/clips.parquet",
    }


def next_number(out: str) -> int:
    """Return the number of the next part."""
    return 1 + max((number for what in ("clips", "rejects") for number, _ in _parts(out, what)), default=-1)


def commit(probed: Probed, out: str, number: int) -> int:
    """Write a part; returns its number of rows."""
    # Clips last: if the process is killed in between, the rejected files are read again.
    storage.publish(table.parquet_bytes(probed.rejects), f"{out}/parts/rejects-{number:06d}.parquet")
    storage.publish(table.parquet_bytes(probed.clips), f"{out}/parts/clips-{number:06d}.parquet")
    return len(probed.clips) + len(probed.rejects)


def forget_rejects(ids: Iterable[str], out: str) -> None:
    """Delete the rejects of tars that were read to the end by now.

    Rejects of other files are superseded by clips with their id, which a tar does not have.
    """
    mended = pa.array(ids, pa.string())
    for _, path in _parts(out, "rejects") if len(mended) else []:
        rejects = table.read(path, "reject.v1")
        kept = rejects.filter(pc.invert(pc.is_in(rejects["id"], mended)))
        if len(kept) < len(rejects):
            storage.publish(table.parquet_bytes(kept), path)


class _Known(NamedTuple):
    """The clips in the parts: sorted ids, and the last part of each."""

    ids: np.ndarray
    parts: np.ndarray

    def parts_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the part of each clip; -1 for unknown clips."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[places] == ids, self.parts[places], -1) if len(self.ids) else np.full(len(ids), -1)


def _known(out: str) -> _Known:
    """Return the clips that were not rejected later; rejected files are read again."""
    ids, parts, is_good = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for what, column in (("clips", "clip_id"), ("rejects", "id")):
        for number, path in _parts(out, what):
            ids.append(_ids(table.read(path, f"{what[:-1]}.v1", [column])[column]))
            parts.append(np.full(len(ids[-1]), number, np.int32))
            is_good.append(np.full(len(ids[-1]), what == "clips"))
    all_ids, all_parts = np.concatenate(ids), np.concatenate(parts)
    order = np.lexsort((all_parts, all_ids))
    all_ids = all_ids[order]
    is_last = np.append(all_ids[1:] != all_ids[:-1], np.ones(min(1, len(all_ids)), bool))
    kept = is_last & np.concatenate(is_good)[order]
    return _Known(all_ids[kept], all_parts[order][kept])


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([int(identity, 16) for identity in column.to_pylist()], np.uint64)


def chunks(rows: Iterator[Row], out: str) -> Iterator[list[Row]]:
    """Yield chunks of rows without duplicates; rows of known clips have `known`, the stored row."""
    _listing.cache_clear()
    known, seen = _known(out), _Seen()
    waiting: list[tuple[int, Row]] = []
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        named: dict[int, Row] = {}
        for row in chunk:
            named.setdefault(int(clip_id(str(row["kind"]), row["uri"]), 16), row)
        unseen = seen.add(named)
        parts = known.parts_of(np.array(unseen, np.uint64)).tolist()
        if new := [named[identity] for identity, part in zip(unseen, parts, strict=True) if part < 0]:
            yield new
        waiting += [(part, named[identity]) for identity, part in zip(unseen, parts, strict=True) if part >= 0]
        if len(waiting) >= _KNOWN_ROWS:
            yield from _with_stored(waiting, out)
            waiting = []
    yield from _with_stored(waiting, out)


class _Seen:
    """The ids seen in this run, mostly in a sorted array: a set would take a dozen times its eight bytes per id."""

    def __init__(self) -> None:
        self._sorted, self._recent = np.zeros(0, np.uint64), set[int]()

    def add(self, ids: Collection[int]) -> list[int]:
        """Add ids, and return those that are new."""
        all_ids = np.fromiter(ids, np.uint64, len(ids))
        places = np.minimum(np.searchsorted(self._sorted, all_ids), len(self._sorted) - 1)
        if len(self._sorted):
            all_ids = all_ids[self._sorted[places] != all_ids]
        new = [identity for identity in all_ids.tolist() if identity not in self._recent]
        self._recent.update(new)
        if len(self._recent) > max(100_000, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return new


def _with_stored(rows: list[tuple[int, Row]], out: str) -> Iterator[list[Row]]:
    """Yield chunks of known rows, ordered by part, with their stored rows. Workers do not need access to `out`."""
    _note_versions([row for _, row in rows])
    rows.sort(key=lambda pair: pair[0])
    chunk: list[Row] = []
    for part, group in groupby(rows, lambda pair: pair[0]):
        rows_of_part = table.read(f"{out}/parts/clips-{part:06d}.parquet", "clip.v1").to_pylist()
        stored = {row["clip_id"]: row for row in rows_of_part}
        for _, row in group:
            chunk.append({**row, "known": stored[clip_id(str(row["kind"]), row["uri"])]})
            if len(chunk) == _CHUNK_ROWS:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _note_versions(rows: list[Row]) -> None:
    """Add sizes and etags of objects from the listings of folders that many rows share: one request for a thousand.

    Workers request those of other objects one by one.
    """
    folders: dict[str, list[Row]] = {}
    for row in rows:
        if re.match(r"(?!https?:)\w+://", row["uri"]) and "::" not in row["uri"] and "#" not in row["uri"]:
            folders.setdefault(row["uri"].rpartition("/")[0], []).append(row)
    for folder_uri, inside in folders.items():
        if len(inside) < _LISTED_ROWS:
            continue
        with suppress(Exception):  # errors of the storage, which the workers will report
            listing = _listing(folder_uri)
            for row in inside:
                row.update(listing.get(row["uri"].rpartition("/")[2], {}))


@lru_cache(maxsize=1)  # rows of a folder are mostly consecutive
def _listing(folder_uri: str) -> dict[str, Row]:
    """Return size and etag of the objects in a folder, by name; only of those that have an etag."""
    fs, path = fsspec.url_to_fs(folder_uri, use_listings_cache=False)
    return {
        info["name"].rpartition("/")[2]: {"size_bytes": info["size"], "etag": str(etag).strip('"')}
        for info in fs.ls(path, detail=True)
        if (etag := info.get("ETag") or info.get("etag"))
    }


def _parts(out: str, what: str) -> list[tuple[int, str]]:
    fs, path = storage.file_system(f"{out}/parts")
    fs.invalidate_cache()
    with storage.access(f"{out}/parts"):
        names = [os.path.basename(name) for name in fs.ls(path, detail=False)] if fs.exists(path) else []  # noqa: PTH119
    numbered = [(int(match[2]), match[0]) for name in names if (match := _PART.fullmatch(name)) and match[1] == what]
    return [(number, f"{out}/parts/{name}") for number, name in sorted(numbered)]


def _last_rejects(out: str, known: _Known) -> list[Row]:
    """Return the latest reject of each file that has not become a clip since."""
    rejects = {
        row["id"]: row for _, path in _parts(out, "rejects") for row in table.read(path, "reject.v1").to_pylist()
    }
    parts = known.parts_of(np.array([int(identity, 16) for identity in rejects], np.uint64))
    return [row for row, part in zip(rejects.values(), parts.tolist(), strict=True) if part < 0]
