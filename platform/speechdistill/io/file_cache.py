"""Copies of remote files on a node's disk, shared by its processes: for noise and rooms, which many samples share.

Copies lie in `SPEECHDISTILL_CACHE` (default: a folder of the user in the system's temporary folder). Together they take
at most `SPEECHDISTILL_CACHE_GIB` (4; 0 for none): the least recently used are deleted. A copy is read if the storage
reports its file as unchanged, which needs no more requests than opening the file there. (fsspec's caches have no bound,
and processes that share one read each other's half-written files.)
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import fsspec

from speechdistill.io import audio_files, storage, tar_files
from speechdistill.io.errors import AudioError, UserError

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_FOLDERS = 16  # by the first digit of the name: a new file requires a look through its own folder only
_UNUSED_S = 86_400.0
_FILES = 16  # at least, in a full folder: 16 MiB each; larger files are read by sections instead
_LOCAL = re.compile("(file|local)://")
_MARKS = ("ETag", "etag", "LastModified", "last_modified", "Last-Modified", "mtime", "modified", "updated", "created")


def read(uri: str, reader: Callable[[str], T]) -> T:
    """Return `reader` of a local copy of the file at `uri`, or of `uri` itself if it is local, large, or not copyable.

    An `AudioError` is always that of `reader(uri)`: a copy that cannot be read is deleted.
    """
    copy = _copy(uri)
    if copy is not None:
        try:
            return reader(str(copy))
        except AudioError:  # evicted meanwhile, damaged, or not audio, like its file
            with suppress(OSError):
                copy.unlink()
    return reader(uri)


def _copy(uri: str) -> Path | None:
    folder_bytes = bound_bytes() // _FOLDERS
    if "://" not in uri or "::" in uri or _LOCAL.match(uri) or folder_bytes <= 0:
        return None
    try:
        size, mark = _version(uri)
        if not mark or not 0 < size <= folder_bytes // _FILES:
            return None
        name = hashlib.sha256(f"{uri}\0{size}\0{mark}".encode("utf-8", "surrogateescape")).hexdigest()
        suffix = re.search(r"\.\w{1,8}$", uri)
        path = _root() / name[0] / (name + (suffix[0] if suffix else ""))
        if not _is_there(path, size):
            _store(uri, size, path)
            _evict(path.parent, folder_bytes)
        return path
    except Exception:  # of the storage, which the caller gets again at `uri`, or of the disk, which is optional
        return None


def made(uri: str, suffix: str, make: Callable[[Path], None]) -> Path | None:
    """Return the file that `make` writes on this node's disk for the current version of `uri`, once for all processes.

    None if there is no cache, its disk cannot hold the file, or the storage reports no version. These files are not
    part of the bound. A file that was not opened for a day is deleted when another is made.
    """
    if not bound_bytes():
        return None
    try:
        size, mark = _version(uri)
    except Exception:  # of the storage, which the caller gets again at `uri`
        return None
    name = hashlib.sha256(f"{storage.absolute(uri)}\0{size}\0{mark}".encode("utf-8", "surrogateescape")).hexdigest()
    path = _root() / "made" / (name + suffix)
    if not mark or not (_is_used(path) or is_made(path, make)):
        return None
    _forget(path.parent)
    return path


def is_made(path: Path, make: Callable[[Path], None]) -> bool:
    """Run `make_once` and return whether the file was made; log a warning if the disk cannot hold the file."""
    try:
        make_once(path, make)
    except UserError:  # of the input of `make`
        raise
    except Exception as error:
        _LOG.warning("%s cannot be written, so processes do not share that file: %s", path, error)
        return False
    return True


def make_once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a local file unless it exists, whole or not at all. One process of many calls `make`; the others wait.

    The lock ends with its process. The part of a killed process has another name, and the next process overwrites it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, lock = (path.with_name(f".{path.name}.{name}") for name in ("part", "lock"))
    with lock.open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        if path.exists():
            return
        try:
            make(part)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        lock.unlink()  # processes that still wait find the file


def fetch(uri: str, path: Path) -> None:
    """Copy a file to this node's disk."""
    fs, there = storage.file_system(uri)
    fs.get_file(there, str(path))


def _forget(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _UNUSED_S:
                path.unlink()


def bound_bytes() -> int:
    """Return `SPEECHDISTILL_CACHE_GIB` in bytes; raises `UserError` if the value is not a number."""
    given = os.environ.get("SPEECHDISTILL_CACHE_GIB", "4")
    try:
        return int(float(given) * 2**30)
    except (ValueError, OverflowError) as error:
        raise UserError(f"SPEECHDISTILL_CACHE_GIB is {given!r}", "give a number of GiB, 0 for no cache") from error


def _version(uri: str) -> tuple[int, str]:
    """Return size in bytes, and a mark that changes with the contents ("" if the storage reports none)."""
    member = tar_files.parse(uri)
    fs, path = fsspec.url_to_fs(member.tar if member else uri)
    info = fs.info(path)
    size = member.size if member else info.get("size") or 0
    return size, next((str(info[name]) for name in _MARKS if info.get(name)), "")


def _root() -> Path:
    if given := os.environ.get("SPEECHDISTILL_CACHE"):
        return Path(given)
    return storage.private_folder(f"speechdistill-cache-{os.getuid()}")  # other users must not be able to write there


def _is_there(path: Path, size: int) -> bool:
    try:
        return _is_used(path) and path.stat().st_size == size
    except FileNotFoundError:
        return False


def _is_used(path: Path) -> bool:
    """Mark a file as used just now; return whether it exists."""
    with suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def _store(uri: str, size: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < size:
        raise OSError(f"{path.parent}: the disk is full")
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # if this process is killed, the file is evicted later
    try:
        with os.fdopen(handle, "wb") as file, audio_files.source(uri) as source:
            if file.write(source.read()) != size:
                raise OSError(f"{uri} was not read whole")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _evict(folder: Path, most_bytes: int) -> None:
    """Delete the least recently used files until `most_bytes` are left."""
    files = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process evicts as well
                files.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
    for _, size, path in sorted(files, reverse=True):
        most_bytes -= size
        if most_bytes < 0:
            Path(path).unlink(missing_ok=True)
