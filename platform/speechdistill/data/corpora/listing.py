"""A list of files with their labels: CSV, TSV, JSONL or Parquet."""

import logging
import posixpath
from collections.abc import Iterator
from os.path import splitext
from pathlib import Path

from speechdistill.data import corpus, manifest_path
from speechdistill.data.listed import Row
from speechdistill.io import storage, user_table
from speechdistill.io.errors import TableError

_LOG = logging.getLogger(__name__)


def rows(file: str) -> Iterator[Row]:
    """Yield a row per line of `file`, a path or URL; its column `path` (or `uri`) is relative to the list's folder.

    The other columns are those of `clip.v1` (`kind` defaults to speech); unknown columns are left out with a warning.
    Raises `TableError` for a file of another type or without paths.
    """
    if splitext(file)[1].lower() not in user_table.SUFFIXES:  # noqa: PTH122 (a URL is no path)
        manifest_path.check(file)
        raise TableError(f"{file}: a list of another type", f"give a file of {', '.join(user_table.SUFFIXES)}")
    folder = str(Path(file).resolve().parent) if "://" not in file else file.rsplit("/", 1)[0]
    is_first = True
    try:
        for line in user_table.rows(file, ["path/uri"]):
            path = corpus.path_of(file, line, "path", "uri")
            if is_first and (unknown := sorted(set(line.values) - corpus.columns())):
                _LOG.warning("%s: columns %s are left out; known are %s", file, unknown, sorted(corpus.columns()))
            is_first = False
            yield corpus.described(file, line, _absolute(path, folder), line.values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TableError(f"{file}: no such list", "give a file with a column path, and mos for scored clips") from error


def _absolute(path: str, folder: str) -> str:
    if "://" not in path and not path.startswith("/"):
        path = f"{folder}/{path}"
        if "://" in path and {".", ".."} & set(path.split("/")):  # names, to an object store
            scheme, place = path.split("://", 1)
            return f"{scheme}://{posixpath.normpath(place)}"
    return storage.one_name(path)
