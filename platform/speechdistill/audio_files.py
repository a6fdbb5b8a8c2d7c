"""Audio files as bytes, on a disk or behind an fsspec URL, and the one error for unusable ones."""

import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec

SAMPLE_RATE = 16_000
"""Hz of every wave inside the platform (Distill-MOS, section IV-B: signal components up to 8 kHz)."""

CONVERT = "convert it (`ffmpeg -i IN -ar 16000 OUT.flac`) or leave it out"
COPY = "copy it again from its source"
# One request to an object store: small beside a section of 10 s, because a FLAC seek touches several places.
_BLOCK_BYTES = 1 << 18
_URL = re.compile(r"[A-Za-z][\w+.-]*(::[A-Za-z][\w+.-]*)*://")


class AudioError(ValueError):
    """A file that cannot be used: which one, why, and what to do about it."""

    def __init__(self, path: str, reason: str, fix: str) -> None:
        super().__init__(path, reason, fix)
        self.path, self.reason, self.fix = path, reason, fix

    def __str__(self) -> str:
        return f"{self.path!r}: {self.reason}; {self.fix}"


@dataclass(frozen=True)
class Info:
    """What a file's header says. `num_frames` is in the file's own sample rate."""

    num_frames: int
    sample_rate: int
    channels: int

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.sample_rate

    @property
    def num_samples(self) -> int:
        """Length after resampling to 16 kHz, rounded down."""
        return self.num_frames * SAMPLE_RATE // self.sample_rate


class Source:
    """A seekable binary file. It keeps its first error, since libsndfile's callbacks cannot raise one."""

    def __init__(self, uri: str, file: IO[bytes]) -> None:
        self._uri, self._file = uri, file
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

    def raise_error(self) -> None:
        """Raise `AudioError` if reading failed: the decoder only saw a file that ended early."""
        if self._error is not None:
            raise _unreadable(self._uri, self._error) from self._error


@contextmanager
def source(uri: str) -> Iterator[Source]:
    """The file, or `AudioError`. A URL is read by ranges: 10 s of a long one do not transfer all of it."""
    try:
        file = _open(uri)
        size = file.seek(0, 2)
        file.seek(0)
    except AudioError:
        raise
    except Exception as error:  # OSError, characters no path may have, an fsspec protocol that is not installed
        raise _unreadable(uri, error) from error
    with file:
        if size == 0:
            raise AudioError(uri, "empty file (0 bytes)", f"{COPY}, or leave it out")
        yield Source(uri, file)


def _open(uri: str) -> IO[bytes]:
    local = re.sub("^(file|local)://", "", uri)  # fsspec would wait for ever on a FIFO
    if _URL.match(local):
        fs, path = fsspec.url_to_fs(uri)
        file: IO[bytes] = fs.open(path, "rb", block_size=_BLOCK_BYTES)  # s3fs would read 50 MB ahead
        return file
    if not stat.S_ISREG(Path(local).stat().st_mode):
        raise AudioError(uri, "not a regular file", "leave it out")
    return Path(local).open("rb")


def _unreadable(uri: str, error: Exception) -> AudioError:
    reason = f"cannot be read ({type(error).__name__}: {one_line(error)})"
    return AudioError(uri, reason, "check the path, its permissions and the connection")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
