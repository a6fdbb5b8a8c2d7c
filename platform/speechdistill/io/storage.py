"""Files on local disks and object stores: written whole or not at all, read with errors that name the address."""

import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import fsspec

from speechdistill.io.errors import StorageError, TableError, UserError


def publish(data: bytes | IO[bytes], uri: str) -> None:
    """Write a file whole or not at all, replacing an older one.

    Locally: a temporary name, fsync and rename. Elsewhere: one put, which is atomic on object stores. (A move would be
    a copy and a delete, and a file object closed by an exception would publish a torn object.)
    """
    with access(uri):
        if "://" in uri:
            fs, path = file_system(uri)
            fs.pipe_file(path, data if isinstance(data, bytes) else data.read())
        else:
            _write_file(data, Path(uri))


def publish_json(value: Any, uri: str) -> None:
    publish((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), uri)


def _write_file(data: bytes | IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(
        f".{uuid.uuid4().hex}.tmp"
    )  # without the target's name, which may have the maximal length
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(BytesIO(data) if isinstance(data, bytes) else data, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_json(uri: str) -> Any | None:
    """Return the parsed file, or None if the file does not exist; raises `TableError` if it is not JSON."""
    try:
        with access(uri, FileNotFoundError, NotADirectoryError), opened(uri) as file:
            data = file.read()
        return json.loads(data)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise TableError(
            f"{uri}: not JSON ({error})", "it may have been edited: restore it or use a new folder"
        ) from error


@contextmanager
def access(uri: str, *passed: type[Exception]) -> Iterator[None]:
    """Turn errors that a storage raises in the body into `StorageError` with the path or URL, except types in `passed`.

    The storage of a URL may raise any type: plugins raise their libraries' own types, mostly without the address.
    """
    try:
        yield
    except Exception as error:
        is_local = "://" not in uri
        if isinstance(error, (UserError, *passed)) or (is_local and not isinstance(error, OSError)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"
        if is_local:
            raise StorageError(f"{uri}: {reason}", "check the path, its permissions and the free space") from error
        raise StorageError(
            f"{uri}: the storage refused it or did not answer ({reason})",
            "check the address, the credentials in the environment and the connection, then rerun the command",
        ) from error


def file_system(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system of a path or URL, and the path there; `StorageError` if the protocol is unknown."""
    with access(uri):
        # A local path is never parsed: fsspec would take `a::b.flac` for an archive.
        is_local = "://" not in uri
        fs, path = (fsspec.filesystem("file"), os.path.abspath(uri)) if is_local else fsspec.url_to_fs(uri)  # noqa: PTH100
    return fs, path


def opened(uri: str, **options: Any) -> Any:
    """Open a path or URL for reading bytes, as a context; `options` go to a URL's file system."""
    return fsspec.open(uri, "rb", **options) if "://" in uri else Path(uri).open("rb")


def absolute(uri: str) -> str:
    """Return an absolute path, since workers run in other folders. `file://` is removed; other URLs are unchanged."""
    if uri.startswith("file://"):
        uri = uri.removeprefix("file://")
    return uri.rstrip("/") if "://" in uri else str(Path(uri).resolve())


def one_name(path: str) -> str:
    """Return one name for a local file, however a list writes its path: with the folder resolved as by `absolute`.

    The file's own name is kept, since a link's target may have another suffix. A URL is returned unchanged.
    """
    path = path.removeprefix("file://")
    if "://" in path:
        return path
    folder, _, name = path.rpartition("/")
    return f"{_resolved(folder)}/{name}" if name not in ("", ".", "..") else path


@lru_cache(maxsize=10_000)  # files of one folder are mostly listed together
def _resolved(folder: str) -> str:
    try:
        return os.path.realpath(folder or "/").rstrip("/")
    except ValueError:  # NUL, or half a character: no folder can have such a name
        return folder


def private_folder(name: str) -> Path:
    """Return a folder of this user in the system's temporary folder; raises `UserError` if others can write to it."""
    folder = Path(tempfile.gettempdir(), name)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder} is not a folder that only this user may write to", "delete it")
    return folder
