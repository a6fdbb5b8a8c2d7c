"""Check that outputs can be written before the work that makes them."""

import os
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from speechdistill.io import storage
from speechdistill.io.errors import StorageError

_OTHER = "give another output"


def try_outputs(*files: str, space_bytes: int = 1 << 20) -> None:
    """Check that files, paths or URLs, can be written; raises `StorageError` naming the first that cannot.

    Writes a file of `space_bytes` in the nearest folder that exists, or a small object beside a URL, and deletes it. No
    folder is made.
    """
    tried_in: set[str] = set()
    for file in files:
        is_url = "://" in file
        folder = file.rpartition("/")[0] if is_url else _folder(file)
        if folder in tried_in or (is_url and any(folder.startswith(f"{other}/") for other in tried_in)):
            continue
        tried_in.add(folder)
        with storage.access(file):
            _try_url(file) if is_url else _try_folder(folder, space_bytes)


def _folder(file: str) -> str:
    """Return the nearest existing folder above a local file."""
    path = Path(file).absolute()
    with storage.access(file):
        if path.is_dir():
            raise StorageError(f"{file} is a folder", "give the name of a file")
        if path.exists() and not os.access(path, os.W_OK):
            raise StorageError(f"{file} is read-only", _OTHER)
        folder = next(parent for parent in path.parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise StorageError(f"{file} lies below {folder}, which is not a folder", _OTHER)
    return str(folder)


def _try_folder(folder: str, space_bytes: int) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-") as file:
        os.posix_fallocate(file.fileno(), 0, space_bytes)


def _try_url(file: str) -> None:
    fs, path = storage.file_system(file)
    beside = f"{path.rpartition('/')[0]}/.try-{uuid.uuid4().hex}"
    fs.pipe_file(beside, b"")
    with suppress(Exception):  # some users may write and not delete: the empty file does no harm
        fs.rm_file(beside)
