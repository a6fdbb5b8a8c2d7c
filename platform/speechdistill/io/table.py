"""Tables on disk: published schemas, validation, Parquet.

A schema is `schemas/<name>.json`, of a table (`clip.v1`, `pseudolabel.v1`, ...) or a JSON document. A published schema
is never edited: a change is a new version. Files appear whole or not at all, on local disks and object stores.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import resources
from io import BytesIO
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.io import storage
from speechdistill.io.errors import TableError

_TYPES = {
    "string": pa.string(),
    "binary": pa.binary(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "list<string>": pa.list_(pa.string()),
}


@cache
def schema(name: str) -> pa.Schema:
    """Return the Arrow schema published as `schemas/<name>.json`; raises `TableError` listing the known names."""
    fields = [
        pa.field(f["name"], _TYPES[f["type"]], f["nullable"], {"description": f["description"]})
        for f in _published(name)["fields"]
    ]
    return pa.schema(fields, metadata={"schema": name})


def from_rows(rows: Iterable[Mapping[str, Any]], name: str) -> pa.Table:
    """Return a valid table of schema `name` from rows as dictionaries; columns that a row lacks are null."""
    rows = list(rows)
    wanted = schema(name)
    unknown = {key for row in rows for key in row} - set(wanted.names)
    if unknown:
        raise TableError(f"{name}: unknown columns {sorted(unknown)}", f"choose from {wanted.names}")
    columns = []
    for field in wanted:
        values = [row.get(field.name) for row in rows]
        try:
            columns.append(pa.array(values, field.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise TableError(f"{name}.{field.name}: {error}", f"give values of type {field.type}") from error
    return validate(pa.Table.from_arrays(columns, schema=wanted), name)


def validate(table: pa.Table, name: str, source: str = "table") -> pa.Table:
    """Return the table with exactly the columns and types of schema `name`; raises `TableError` naming the column."""
    wanted = schema(name)
    missing = [field.name for field in wanted if field.name not in table.column_names and not field.nullable]
    if missing:
        raise TableError(
            f"{source}: columns {missing} of {name} are missing; it has {table.column_names}",
            f"give a table of schema {name}",
        )
    columns = []
    for field in wanted:
        if field.name not in table.column_names:
            columns.append(pa.nulls(len(table), field.type))
            continue
        column = table[field.name]
        try:
            column = column.cast(field.type)
        except pa.ArrowException as error:
            reason = f"{source}: {name}.{field.name}: {error}"
            raise TableError(reason, f"give values that convert to {field.type}") from error
        if column.null_count and not field.nullable:
            reason = f"{source}: {name}.{field.name} is null in {column.null_count} rows"
            raise TableError(reason, "give each row a value")
        columns.append(column)
    result = pa.Table.from_arrays(columns, schema=wanted)
    for field_name, allowed in choices(name).items():
        wrong = set(result[field_name].unique().to_pylist()) - {*allowed, None}
        if wrong:
            raise TableError(f"{source}: {name}.{field_name} is {sorted(wrong)}", f"choose from {allowed}")
    return result


def read(uri: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read and validate a Parquet file of schema `name`; `columns` reads only some of them."""
    with _opened(uri, name) as file:
        table = pq.read_table(file, columns=columns)
    return table if columns else validate(table, name, uri)


@contextmanager
def streamed(uri: str, name: str, columns: list[str]) -> Iterator[Callable[[list[str]], Iterable[pa.RecordBatch]]]:
    """Yield a function that reads some of the `columns` of a Parquet file in small batches, at each call."""
    with _opened(uri, name) as file:
        parquet = pq.ParquetFile(file)
        if missing := [column for column in columns if column not in parquet.schema_arrow.names]:
            raise pa.ArrowInvalid(f"columns {missing} are missing")
        yield lambda some: parquet.iter_batches(columns=some, use_threads=False)


@contextmanager
def _opened(uri: str, name: str) -> Iterator[IO[bytes]]:
    try:
        with open_parquet(uri) as file:
            yield file
    except FileNotFoundError as error:
        raise TableError(f"{uri}: no such file", f"run the command that makes the {name} table first") from error
    except pa.ArrowInvalid as error:
        raise TableError(f"{uri}: not a Parquet file ({error})", f"give a whole file of schema {name}") from error


def column_names(uri: str) -> list[str]:
    """Return the names of a Parquet file's columns; raises `TableError` if the file is missing or is not Parquet."""
    try:
        with open_parquet(uri) as file:
            names: list[str] = pq.read_schema(file).names
    except FileNotFoundError as error:
        raise TableError(f"{uri}: no such file", "check the path") from error
    except pa.ArrowInvalid as error:
        raise TableError(f"{uri}: not a Parquet file ({error})", "give a whole file") from error
    return names


@contextmanager
def open_parquet(uri: str, ahead_bytes: int | None = None) -> Iterator[IO[bytes]]:
    """Open a file for Arrow; raises `pa.ArrowInvalid` for a damaged file.

    Requests to a URL read `ahead_bytes` beyond the requested bytes (default of s3fs: 50 MB).
    """
    options = {} if ahead_bytes is None or "://" not in uri else {"block_size": ahead_bytes}
    with storage.access(uri, FileNotFoundError, pa.ArrowInvalid), storage.opened(uri, **options) as file:
        try:
            yield file
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # Arrow's error for most damaged files
                raise pa.ArrowInvalid(str(error)) from error
            raise


def parquet_bytes(
    table: pa.Table, metadata: Mapping[str, str] | None = None, row_group_size: int | None = None
) -> bytes:
    """Return a whole Parquet file in memory, with extra `metadata` in its footer."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **(metadata or {})})
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=row_group_size)
    return buffer.getvalue()


def publish_stream(tables: Iterable[pa.Table], name: str, uri: str) -> None:
    """Write tables of schema `name` as one Parquet file, whole or not at all, one table in memory at a time.

    (On an object store the compressed file is gathered in memory first, since only a put is atomic there.)
    """
    with tempfile.TemporaryFile() if "://" not in uri else BytesIO() as file:
        with pq.ParquetWriter(file, schema(name), compression="zstd") as writer:
            for part in tables:
                writer.write_table(part)
        file.seek(0)
        storage.publish(file, uri)


def check_json(document: Any, name: str, source: str) -> None:
    """Raise `TableError` naming the place in `document` that does not fit the JSON schema `name`."""
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(_published(name)).iter_errors(document))
    if error is not None:
        place = error.json_path.removeprefix("$")
        raise TableError(f"{source}: {name}{place}: {error.message}", f"correct it by the schema schemas/{name}.json")


@cache
def _published(name: str) -> dict[str, Any]:
    folder = resources.files("speechdistill") / "schemas"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json"))
        raise TableError(f"schema {name!r} is unknown", f"choose from {known}")
    published: dict[str, Any] = json.loads(file.read_text())
    return published


def choices(name: str) -> dict[str, list[str]]:
    """Return the allowed values of each column of schema `name` that has a fixed set of them."""
    return {f["name"]: f["choices"] for f in _published(name)["fields"] if "choices" in f}
