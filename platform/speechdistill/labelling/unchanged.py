"""Files that have changed since they were ingested: rejected, not labelled as what they were."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec

from speechdistill.data.clips import Clip
from speechdistill.io import audio_files, tar_files
from speechdistill.io.errors import AudioError


class Ingested(NamedTuple):
    """A file and what the manifest says of it; None where it says nothing."""

    uri: str
    size_bytes: int | None
    etag: str | None


@contextmanager
def unchanged(clips: Iterable[Ingested | Clip]) -> Iterator[None]:
    """Raise `AudioError` for a file whose size or etag is not that of its manifest.

    A local file costs a stat. For an object the storage is asked once: the body, which opens it, gets the same answer,
    so there is no request more. Members of remote tars have only their headers compared, when they are read.
    """
    answers: list[tuple[Any, str]] = []
    try:
        for clip in clips:
            try:
                found = _version(clip, answers)
            except Exception as error:  # storage plugins raise their libraries' own types
                raise audio_files.unreadable(clip.uri, error) from error
            pairs = zip((clip.size_bytes, clip.etag), found, strict=True)
            if any(None not in pair and pair[0] != pair[1] for pair in pairs):
                reason = f"changed since it was ingested ({clip.size_bytes} bytes then, {found[0]} now, or rewritten)"
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
        fs.dircache[path] = [fs.info(path)]  # where file systems look first for what they know of a file
        answers.append((fs, path))
    return audio_files.version(clip.uri)
