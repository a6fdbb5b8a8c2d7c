"""Tar archives by byte ranges: an index of members from the headers alone, and members as files.

The URI of a member, `s3://bucket/shard.tar#offset=1536&size=32044&member=utt1.flac`, gives the place of its bytes. The
name is last and not escaped, since it may contain any character.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Protocol

_MAX_HEADER_BYTES = 1 << 20
_MEMBER = re.compile(r"(.+?)#offset=([0-9]+)&size=([0-9]+)&member=(.+)", re.DOTALL)


class Member(NamedTuple):
    """`size` bytes of audio from byte `offset` of `tar`, a path or URL; after a header of 512 bytes."""

    tar: str
    offset: int
    size: int
    name: str

    @property
    def uri(self) -> str:
        return f"{self.tar}#offset={self.offset}&size={self.size}&member={self.name}"

    def is_in(self, file: IO[bytes]) -> bool:
        """Whether the header before `offset` is that of this member: the tar may have been replaced since the index."""
        file.seek(self.offset - tarfile.BLOCKSIZE)
        try:
            header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.TarError:
            return False
        # Headers hold the beginning of a long name, and writers encode names that are not ASCII differently.
        has_name = len(self.name) < 99 and self.name.isascii()
        return header.size == self.size and (header.name == self.name or not has_name)


def parse(uri: str) -> Member | None:
    """Return the member with this `Member.uri`; None for any other path or URL."""
    match = _MEMBER.fullmatch(uri)
    return Member(match[1], int(match[2]), int(match[3]), match[4]) if match else None


class Readable(Protocol):
    """Seekable binary file, with the methods that a section needs."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def close(self) -> None: ...


class Section:
    """Seekable file over `size` bytes of another file from byte `start`."""

    def __init__(self, file: IO[bytes] | Readable, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self._position, self._size)[whence]
        if position < 0:
            raise ValueError(f"seek to {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        self._file.close()


def index(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield every whole member in order, reading headers only; memory does not grow with their number.

    Raises `tarfile.ReadError` for a file that is not a tar, and after the last whole member of a cut or corrupt one.
    """
    size = file.seek(0, 2)
    file.seek(0)
    headers: Any = _Headers(file, size)
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8") as tar:
        end = 0
        while info := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
            if info.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"a negative size in the header before byte {end}")
            if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
                raise tarfile.ReadError(f"the file ends inside {info.name!r}")
            end = tar.offset
            yield info
        _check_end(file, end)


class _Headers:
    """File for `tarfile` that limits reads: a corrupt size must not make it read gigabytes as a long name."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        if not 0 <= offset <= self._size:
            raise tarfile.ReadError(f"the file ends before byte {offset}")
        return self._file.seek(offset)


def _check_end(file: IO[bytes], end: int) -> None:
    """Raise `ReadError` without a block of zeros at the end: `tarfile` stops silently at a cut or corrupt header."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError(f"the file ends at byte {end} without the mark of a tar's end")
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"the file ends inside the header at byte {end}")
    if any(block):
        raise tarfile.ReadError(f"no valid header at byte {end}")
