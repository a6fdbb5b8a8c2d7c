"""A list of files with what the user knows of them: CSV, JSONL or Parquet."""

import csv
import json
import logging
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.data import corpus
from speechdistill.io import storage
from speechdistill.io.errors import TableError

_LOG = logging.getLogger(__name__)


def rows(file: str) -> Iterator[dict[str, Any]]:
    """A row per line of `file`, a path or URL; its column `path` (or `uri`) is relative to the list's own folder.

    The other columns are those of `clip.v1` (`kind` defaults to speech); further ones are named in a warning and
    left out. Raises `TableError` for a file of another kind or without paths.
    """
    folder = str(Path(file).resolve().parent) if "://" not in file else file.rsplit("/", 1)[0]
    for number, line in enumerate(_lines(file)):
        path = line.pop("path", None) or line.pop("uri", None)
        if not path:
            raise TableError(f"{file}: row {number + 1} has no path", "name that column 'path' or 'uri'")
        if number == 0 and (unknown := sorted(set(line) - corpus.columns())):
            _LOG.warning("%s: columns %s are left out; known are %s", file, unknown, sorted(corpus.columns()))
        yield {"kind": "speech", **corpus.given(line), "uri": _absolute(str(path), folder)}


def _lines(file: str) -> Iterator[dict[str, Any]]:
    wrong = (UnicodeDecodeError, csv.Error, pa.ArrowInvalid)
    try:
        with storage.access(file, FileNotFoundError, *wrong):
            yield from _read(file)
    except FileNotFoundError as error:
        raise TableError(f"{file}: no such list", "give a file with a column path, and mos for scored clips") from error
    except wrong as error:
        raise TableError(f"{file} cannot be read as a list ({error})", "correct it; texts are UTF-8") from error


def _read(file: str) -> Iterator[dict[str, Any]]:
    suffix = Path(file).suffix.lower()
    if suffix == ".csv":
        with fsspec.open(file, "rt", newline="", encoding="utf-8-sig") as lines:
            yield from csv.DictReader(lines, restkey="(fields beyond the header)")
    elif suffix in (".jsonl", ".ndjson"):
        with fsspec.open(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                if line.strip():
                    yield _parsed(file, number, line)
    elif suffix == ".parquet":
        with fsspec.open(file, "rb") as data:
            for batch in pq.ParquetFile(data).iter_batches(batch_size=2_000):
                yield from batch.to_pylist()
    else:
        raise TableError(f"{file}: a list of another type", "give a .csv, .jsonl or .parquet file")


def _parsed(file: str, number: int, line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise TableError(f"{file}: line {number + 1} is not a JSON object ({error})", "correct the list") from error


def _absolute(path: str, folder: str) -> str:
    if "://" in path or path.startswith("/"):
        return path
    if "://" in folder and {".", ".."} & set(path.split("/")):  # an object store takes them for names
        scheme, place = folder.split("://", 1)
        return f"{scheme}://{posixpath.normpath(f'{place}/{path}')}"
    return f"{folder}/{path}"
