"""Headers of audio files -> rows of the manifest, or the reason why there is none."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from speechdistill.data.clips import clip_id
from speechdistill.io import audio, audio_files, table, tar_files
from speechdistill.io.audio import MIN_DURATION_S
from speechdistill.io.errors import AudioError, TableError, UnreadableError

_CONTENT = {"duration_s": "length", **dict.fromkeys(("size_bytes", "etag", "sample_rate", "channels"), "content")}
_THREADS = 8  # per task: reading a header is mostly waiting
Row = dict[str, Any]


class Probed(NamedTuple):
    """The good and the rejected rows of a chunk, and what has changed of known clips."""

    clips: pa.Table
    rejects: pa.Table
    changes: Counter[str]


def probed(chunk: list[Row], probe: Callable[[Row], Row]) -> Probed:
    """Nothing that a file or a list's line holds may stop the run."""
    with ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(partial(_tried, probe), chunk))
    good = [result for result in results if isinstance(result, dict)]
    try:
        clips = table.from_rows(good, "clip.v1")
    except TableError:  # row by row, to find which; otherwise it would cost more than reading the headers
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
    """The row as it is stored, its error, or None for a known clip that is as it was."""
    known = row.get("known", {})
    row = {key: value for key, value in row.items() if key != "known"}
    try:
        if known and _is_same(row, known):
            return None
        return {**known, **probe(row), "clip_id": clip_id(str(row["kind"]), row["uri"])}
    except Exception as error:  # whatever a file or a line holds: its row is rejected with it
        return error


def _is_same(row: Row, known: Row) -> bool:
    """Whether a known clip has the labels that are given, and the version of its file; False where that is not known,
    which its probe will tell.
    """
    try:
        now = {**row, **_version(row)}
    except Exception:
        return False
    return "error" not in row and all(known[key] == value for key, value in now.items() if value is not None)


def _is_kept(row: Row, error: Exception) -> bool:
    """Whether a known clip stays as it is: its storage did not answer, which may be temporary."""
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
    """Return a row of the manifest for a file; raises `AudioError` if the file is unusable."""
    uri = row["uri"]
    if "error" in row:  # what its corpus found out already
        raise row["error"]
    if any("\ud800" <= character <= "\udfff" for character in uri):
        raise AudioError(uri, "its name is not UTF-8, and tables hold only UTF-8", "rename the file")
    info = audio.probe(uri)
    if row["kind"] == "speech" and info.duration_s < MIN_DURATION_S:
        raise AudioError(uri, f"{info.duration_s:.4f} s of speech cannot be judged", "leave it out")
    return {**row, **info.columns(), **_version(row)}


def _version(row: Row) -> Row:
    member = tar_files.parse(row["uri"])
    if member and "etag" in row:  # the tar's: asking again would be a request for each member
        return {"size_bytes": member.size}
    if "size_bytes" in row:  # the listing of its folder told it
        return {}
    size, etag = audio_files.version(row["uri"])
    return {"size_bytes": size, "etag": etag}
