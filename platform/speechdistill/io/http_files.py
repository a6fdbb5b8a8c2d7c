"""Files of web servers, read by ranges, or whole if the server does not support ranges."""

import tempfile
from io import RawIOBase
from typing import IO, Any

import fsspec

PROTOCOLS = ("http://", "https://")


def open_file(url: str, block_bytes: int) -> IO[bytes]:
    """Open the file at `url`, seekable; one request is at least `block_bytes`.

    A server may answer a range with the whole file, or report no length: the file is then downloaded to a temporary
    file.
    """
    from fsspec.implementations.http import HTTPFile  # imports aiohttp, which most commands do not need

    fs, path = fsspec.url_to_fs(url)
    file = fs.open(path, "rb", block_size=block_bytes)
    if isinstance(file, HTTPFile):
        opened: Any = _Ranged(file)
        return opened  # type: ignore[no-any-return]
    file.close()
    return _whole(fs, path)


class _Ranged(RawIOBase):
    """File that is downloaded once its server has not answered with the requested range."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        place = self._file.tell()
        try:
            return bytes(self._file.read(size))
        except ValueError as error:
            if "range requests" not in str(error):
                raise
        ranged, self._file = self._file, _whole(self._file.fs, self._file.path)
        ranged.close()
        self._file.seek(place)
        return bytes(self._file.read(size))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


def _whole(fs: Any, path: str) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        fs.get_file(path, file)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file
