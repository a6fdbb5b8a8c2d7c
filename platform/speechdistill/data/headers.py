"""Rows of the manifest from the headers of audio files, and the reasons for rejected files."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from speechdistill.data.clips import clip_id
from speechdistill.data.listed import Row
from speechdistill.io import audio, audio_files, table, tar_files
from speechdistill.io.audio import MIN_DURATION_S
from speechdistill.io.errors import AudioError, TableError, UnreadableError

_CONTENT = {"duration_s": "length", **dict.fromkeys(("size_bytes", "etag", "sample_rate", "channels"), "content")}
_THREADS = 8  # in a task; reading headers is mostly waiting


class Probed(NamedTuple):
    """Good and rejected rows of a chunk, and counts of the changes of known clips."""

    clips: pa.Table
    rejects: pa.Table
    changes: Counter[str]


def probed(chunk: list[Row], probe: Callable[[Row], Row]) -> Probed:
    """Read the headers of a chunk with `probe`. Errors reject their row and never stop the run."""
    with ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(partial(_tried, probe), chunk))
    good = [result for result in results if isinstance(result, dict)]
    try:
        clips = table.from_rows(good, "clip.v1")
    except TableError:  # validated row by row only now: that takes longer than reading the headers
        results = [_valid(result) for result in results]
        clips = table.from_rows([result for result in results if isinstance(result, dict)], "clip.v1")
    changes: Counter[str] = Counter()
    for row, result in zip(chunk, results, strict=True):
        if "known" in row:
            changes.update(_changes(row["known"], result))
    rejects = [
        {**_reason(result), "id": clip_id(str(row["kind"]), row["uri"])}
        for row, result in zip(chunk, results, strict=True)
        if isinstance(result, Exception) and not _is_kept(row, result)
    ]
    return Probed(clips, table.from_rows(rejects, "reject.v1"), changes)


def _tried(probe: Callable[[Row], Row], row: Row) -> Row | Exception | None:
    """Return the row to store, its error, or None for a known clip that has not changed."""
    known = row.get("known", {})
    row = {key: value for key, value in row.items() if key != "known"}
    try:
        if known and _is_same(row, known):
            return None
        return {**known, **probe(row), "clip_id": clip_id(str(row["kind"]), row["uri"])}
    except Exception as error:  # any error of a file or a line rejects its row
        return error


def _is_same(row: Row, known: Row) -> bool:
    """Return whether labels and file version of a known clip are unchanged; False if the version is unknown."""
    try:
        now = {**row, **_version(row)}
    except Exception:
        return False
    return "error" not in row and all(known[key] == value for key, value in now.items() if value is not None)


def _is_kept(row: Row, error: Exception) -> bool:
    """Return whether a known clip is kept: its storage did not answer, which may be temporary."""
    return "known" in row and isinstance(error, UnreadableError)


def _changes(known: Row, result: Row | Exception | None) -> set[str]:
    if result is None:
        return set()
    if isinstance(result, Exception):
        return {"unreadable" if isinstance(result, UnreadableError) else "rejected"}
    names = {_CONTENT.get(key, key) for key, value in result.items() if known[key] != value}
    return {"updated", *names}


def _valid(result: Row | Exception | None) -> Row | Exception | None:
    try:
        if isinstance(result, dict):
            table.from_rows([result], "clip.v1")
        return result
    except TableError as error:
        return error


def _reason(error: Exception) -> Row:
    message = str(error).encode(errors="backslashreplace").decode()
    return {"stage": "ingest", "error_type": type(error).__name__, "message": message}


def clip(row: Row) -> Row:
    """Return the row of a file for the manifest; raises `AudioError` if the file is unusable."""
    uri = row["uri"]
    if "error" in row:  # found by the reader of its corpus
        raise row["error"]
    if any("\ud800" <= character <= "\udfff" for character in uri):
        raise AudioError(uri, "the name is not UTF-8, which tables require", "rename the file")
    info = audio.probe(uri)
    if row["kind"] == "speech" and info.duration_s < MIN_DURATION_S:
        raise AudioError(uri, f"{info.duration_s:.4f} s of speech cannot be judged", "leave it out")
    return {**row, **info.columns(), **_version(row)}


def _version(row: Row) -> Row:
    member = tar_files.parse(row["uri"])
    if member and "etag" in row:  # the etag of the tar; looking it up again would be a request for each member
        return {"size_bytes": member.size}
    if "size_bytes" in row:  # from the listing of its folder
        return {}
    size, etag = audio_files.version(row["uri"])
    return {"size_bytes": size, "etag": etag}
