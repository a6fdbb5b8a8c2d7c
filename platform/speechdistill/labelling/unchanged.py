"""Check that files have not changed since they were ingested; changed files are rejected."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec

from speechdistill.data.clips import Clip
from speechdistill.io import audio_files, tar_files
from speechdistill.io.errors import AudioError


class Ingested(NamedTuple):
    """A file and its version in the manifest; None if unknown."""

    uri: str
    size_bytes: int | None
    etag: str | None


@contextmanager
def unchanged(clips: Iterable[Ingested | Clip]) -> Iterator[None]:
    """Raise `AudioError` for a file whose size or etag differs from the manifest.

    A local file costs a stat. For an object the answer of the storage is cached for the body, which opens the object,
    so there is no further request. Of members of remote tars only the headers are compared, when they are read.
    """
    answers: list[tuple[Any, str]] = []
    try:
        for clip in clips:
            try:
                version = _version(clip, answers)
            except Exception as error:  # storage plugins raise their libraries' own types
                raise audio_files.unreadable(clip.uri, error) from error
            pairs = zip((clip.size_bytes, clip.etag), version, strict=True)
            if any(None not in pair and pair[0] != pair[1] for pair in pairs):
                reason = f"changed since it was ingested ({clip.size_bytes} bytes then, {version[0]} now, or rewritten)"
                raise AudioError(clip.uri, reason, "rerun ingest, then label into another --out")
        yield
    finally:
        for fs, path in answers:
            fs.dircache.pop(path, None)


def _version(clip: Ingested | Clip, answers: list[tuple[Any, str]]) -> tuple[int | None, str | None]:
    if (clip.size_bytes, clip.etag) == (None, None) or (tar_files.parse(clip.uri) and "://" in clip.uri):
        return None, None
    if "://" in clip.uri and "::" not in clip.uri:
        fs, path = fsspec.url_to_fs(clip.uri)
        fs.dircache[path] = [fs.info(path)]  # where fsspec looks up a file first
        answers.append((fs, path))
    return audio_files.version(clip.uri)
