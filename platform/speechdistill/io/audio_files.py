"""Bytes of audio files on a disk, at an fsspec URL or in a tar."""

import re
import stat
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec
from fsspec.spec import AbstractBufferedFile

from speechdistill.io import http_files, tar_files
from speechdistill.io.errors import AudioError, UnreadableError
from speechdistill.io.tar_files import Section

SAMPLE_RATE = 16_000
"""Hz of every wave inside the platform (Distill-MOS, section IV-B: signal components up to 8 kHz)."""

CONVERT = "convert it (`ffmpeg -i IN -ar 16000 OUT.flac`) or leave it out"
COPY = "copy it again from its source"
REWRITE = f"{COPY}, or rewrite its header (`ffmpeg -i IN OUT`)"
EXPORT = "export it again as 16-bit PCM from the program that wrote it"
SPLIT = "split it, or convert its parts to one format and join them again (`sox A B OUT.flac`)"
# One request to an object store: small compared with a section of 10 s, since a FLAC seek reads several places.
_BLOCK_BYTES = 1 << 18
_URL = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")


@dataclass(frozen=True)
class Info:
    """Header of a file. `num_frames` is in the file's own sample rate."""

    num_frames: int
    sample_rate: int
    channels: int

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.sample_rate

    @property
    def num_samples(self) -> int:
        """Return the length after resampling to 16 kHz, rounded down."""
        return self.num_frames * SAMPLE_RATE // self.sample_rate

    def columns(self) -> dict[str, float | int]:
        """Return the columns of a manifest for the file."""
        return {"duration_s": self.duration_s, "sample_rate": self.sample_rate, "channels": self.channels}


class Source:
    """Seekable binary file of `size` bytes that keeps its first error: libsndfile's callbacks cannot raise errors."""

    def __init__(self, uri: str, file: IO[bytes] | Section, size: int) -> None:
        self._uri, self._file, self.size = uri, file, size
        self._error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # storage plugins raise their libraries' own types
            self._error = self._error or error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # a corrupt header that points outside the file
            return -1

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def section(self, begin: int, end: int | None = None) -> "Source":
        """Return the bytes from `begin` to `end`, or to the end of the file, as a source. This one keeps its errors."""
        size = (self.size if end is None else end) - begin
        return Source(self._uri, Section(self, begin, size), size)

    def patched(self, place: int, data: bytes) -> "Source":
        """Return the same bytes with `data` at `place`, to correct a header that decoders misread."""
        return Source(self._uri, _Patched(self, place, data), self.size)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Return to this position afterwards: a decoder that reads the file expects its position unchanged."""
        here = self.tell()
        try:
            yield
        finally:
            self.seek(here)

    def raise_error(self) -> None:
        """Raise `AudioError` if reading failed: the decoder only saw a file that ended early."""
        if self._error is not None:
            raise unreadable(self._uri, self._error) from self._error


class _Patched(Section):
    """Source with replaced bytes at one place."""

    def __init__(self, source: Source, place: int, data: bytes) -> None:
        super().__init__(source, 0, source.size)
        self._place, self._data = place, data

    def read(self, size: int = -1) -> bytes:
        begin = self.tell()
        read = super().read(size)
        first, last = max(begin, self._place), min(begin + len(read), self._place + len(self._data))
        if first >= last:
            return read
        inside = self._data[first - self._place : last - self._place]
        return read[: first - begin] + inside + read[last - begin :]


@contextmanager
def source(uri: str) -> Iterator[Source]:
    """Open a file; raises `AudioError`. URLs are read by ranges: 10 s of a long recording do not transfer all of it."""
    try:
        file = _opened(uri)
        size = file.seek(0, 2)
        file.seek(0)
    except AudioError:
        raise
    except Exception as error:  # OSError, characters no path may have, an fsspec protocol that is not installed
        raise unreadable(uri, error) from error
    with closing(file):
        if size == 0:
            raise AudioError(uri, "empty file (0 bytes)", f"{COPY}, or leave it out")
        yield Source(uri, file, size)


def open_file(uri: str, block_bytes: int = _BLOCK_BYTES, end: int | None = None) -> IO[bytes]:
    """Open a local regular file or a URL, seekable. One request for a URL is at least `block_bytes`, up to byte `end`.

    Raises `AudioError` for a FIFO, a folder or a device, and the errors of the storage.
    """
    if uri.startswith(http_files.PROTOCOLS):
        return http_files.open_file(uri, block_bytes)
    local = re.sub("^(file|local)://", "", uri)  # fsspec would wait for ever on a FIFO
    if _URL.match(local):
        fs, path = fsspec.url_to_fs(uri)
        has_ranges = fs.async_impl and "::" not in uri
        file: IO[bytes] = (
            _Ranged(fs, path, block_size=block_bytes, size=end)
            if end is not None and has_ranges
            else fs.open(path, "rb", block_size=block_bytes)  # s3fs would read 50 MB ahead
        )
        if "::" in uri:
            weakref.finalize(file, id, fs)  # an archive's file system closes its files when it is deleted
        return file
    if not stat.S_ISREG(Path(local).stat().st_mode):
        raise AudioError(uri, "not a regular file", "leave it out")
    return Path(local).open("rb")


def version(uri: str) -> tuple[int | None, str | None]:
    """Return size in bytes and etag: an object store's, or size and modification time. Members have the tar's etag."""
    if member := tar_files.parse(uri):
        return member.size, version(member.tar)[1]
    if "://" not in uri:
        status = Path(uri).stat()
        return status.st_size, f"{status.st_size}-{status.st_mtime_ns}"
    fs, path = fsspec.url_to_fs(uri)
    info = fs.info(path)
    etag = info.get("ETag") or info.get("etag")
    return info.get("size"), str(etag).strip('"') if etag else None


def unreadable(uri: str, error: Exception) -> AudioError:
    """Return the storage's error as an `AudioError` with a fix, `UnreadableError` if it may be temporary."""
    reason = f"cannot be read ({type(error).__name__}: {one_line(error)})"
    is_wrong = isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError, ImportError))
    return (AudioError if is_wrong else UnreadableError)(
        uri, reason, "check the path, its permissions and the connection"
    )


class _Ranged(AbstractBufferedFile):  # type: ignore[misc]
    """Object of known size, which saves a request for each member of a tar."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs.cat_file(self.path, start=start, end=end)
        return data


def _opened(uri: str) -> IO[bytes] | Section:
    member = tar_files.parse(uri)
    if member is None:
        return open_file(uri)
    file = open_file(member.tar, end=member.offset + member.size)
    if not member.is_in(file):
        file.close()
        raise AudioError(uri, "its tar has changed since it was ingested", "ingest the tar into a new manifest")
    return Section(file, member.offset, member.size)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
