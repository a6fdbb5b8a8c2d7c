"""Read tables written by users, row by row: CSV and its variants, JSONL, Parquet. All lists and label files.

- Encoding: UTF-8 with or without a byte order mark, UTF-16 with one. Others are refused with their line.
- Delimiter: the one of comma, semicolon, tab and bar that gives the header line the most columns.
- Quotes enclose fields between commas and semicolons, line breaks included. Between tabs and bars a field ends at the
  next delimiter, since corpora do not escape quotation marks there (Common Voice).
- Names of columns: in any case, blanks around them ignored; columns without a name are left out.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from itertools import chain
from os.path import splitext
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from speechdistill.io import storage, table
from speechdistill.io.errors import TableError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
"""Suffixes of lists; a file with another suffix is read as a CSV."""

_DELIMITERS = ",;\t|"
_UNQUOTED = "\t|"
_SEP = re.compile(
    r'"?sep=.?"?\s*$', re.IGNORECASE
)  # a spreadsheet's line with the delimiter, which the header shows as well
_LONGEST_FIELD = 1 << 24  # characters: some transcripts have more than Python's limit of 2^17
_END = "\n"  # after the last line: a row whose quote is still open there never closes it
_HEADER_FIX = "rename or add them in the first line, which names the columns, with , ; tab or | between"
_QUOTE_FIX = "close it, double quotation marks within a text, or save the list with tabs between fields"


class Line(NamedTuple):
    """A row. `number` is its first line, from 1 (in a Parquet file, the row); `fault` is the reason if it is
    unusable."""

    number: int
    values: dict[str, Any]
    fault: str | None = None


def rows(file: str, needed: Sequence[str], names: Sequence[str] | None = None) -> Iterator[Line]:
    """Yield the rows of a table with at least the columns `needed` (`path/uri`: one of the two), except blank rows.

    `names` are the columns of a CSV without a header. Raises `TableError` for a table that cannot be read or lacks a
    column, naming the existing ones, and `FileNotFoundError` or `NotADirectoryError`.
    """
    suffix = splitext(file)[1].lower()  # noqa: PTH122 (a URL is no path)
    wrong = (UnicodeError, pa.ArrowInvalid)
    try:
        with storage.access(file, FileNotFoundError, NotADirectoryError, *wrong):
            if suffix == ".parquet":
                yield from _parquet(file, needed)
            elif suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(file, needed)
            else:
                yield from _delimited(file, needed, names)
    except wrong as error:
        raise TableError(f"{file} cannot be read as a table ({error})", "save it again; texts are UTF-8") from error


def _delimited(file: str, needed: Sequence[str], names: Sequence[str] | None) -> Iterator[Line]:
    with _text(file) as lines:
        records = _records(file, lines, names is not None)
        columns, most = list(names or ()), None
        if names is None:
            _, header = next(records, (1, []))
            columns = _columns(file, header, needed, _HEADER_FIX)
            most = len(header)
        fewest = max((number for number, name in enumerate(columns, 1) if name), default=0)
        for number, fields in records:
            values = dict(zip(columns, fields, strict=False))
            values.pop("", None)
            count, fault = len(fields), None
            # Fields after an extra delimiter are in wrong columns; spreadsheets add empty ones at the end.
            if count < fewest or (most and count > most and any(map(str.strip, fields[most:]))):
                fault = f"has {count} fields instead of {fewest}"
            yield Line(number, values, fault)


def _records(file: str, lines: Iterator[str], is_plain: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each row that is not blank, and the number of its first line. A plain table has commas."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip() and not _SEP.match(line))
    start, first = next(numbered, (1, ""))
    form = {"delimiter": ","} if is_plain else _form(first)
    is_unquoted = form["delimiter"] in _UNQUOTED
    csv.field_size_limit(_LONGEST_FIELD)
    raw: list[str] = []
    width = 0
    try:
        for fields in csv.reader(_noted(chain([first], lines), raw), **form):
            width = width or len(fields)
            if len(raw) > 1:
                _check_quotes(file, start, raw, fields, width, form)
            if any(map(str.strip, fields)):
                yield start, [_bare(field) for field in fields] if is_unquoted else fields
            start += len(raw)
            raw.clear()
    except csv.Error as error:
        reason = f"{file}, line {start}: the row that begins here cannot be read ({error})"
        raise TableError(reason, f"if a quote opens in it, {_QUOTE_FIX}") from error


def _noted(lines: Iterable[str], raw: list[str]) -> Iterator[str]:
    """Yield the lines, each added to `raw` when it is read, and an end mark that shows whether a quote is open."""
    for line in chain(lines, [_END]):
        raw.append(line)
        yield line


def _form(header: str) -> dict[str, Any]:
    """Return the form of a table for `csv.reader`, from its header line."""
    by_count = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in _DELIMITERS}
    mark = max(_DELIMITERS, key=lambda delimiter: by_count[delimiter])
    spaced = header.count(mark) == header.count(
        f"{mark} "
    )  # `path, mos`: rows have the blanks as well, also before quotes
    quoting = csv.QUOTE_NONE if mark in _UNQUOTED else csv.QUOTE_MINIMAL
    return {"delimiter": mark, "quoting": quoting, "skipinitialspace": spaced}


def _bare(field: str) -> str:
    """Return a field unchanged, unless it is quoted as a whole, as spreadsheets do."""
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
    return field[1:-1].replace('""', '"') if is_quoted else field


def _check_quotes(file: str, start: int, raw: list[str], fields: list[str], width: int, form: dict[str, Any]) -> None:
    """Raise `TableError` if a quote in a row of several lines does not close, or a line reads like a row."""
    end = start + len(raw) - 1
    if raw[-1] == _END:  # a row of several lines ends in one with a quote
        raise TableError(f"{file}, line {start}: a quote opens and never closes", _QUOTE_FIX)
    try:
        next(csv.reader(raw, **form, strict=True))
        closes = len(fields) == width
    except csv.Error:
        closes = False
    if not closes:
        raise TableError(f"{file}, line {start}: a quote opens, and the next, in line {end}, does not fit", _QUOTE_FIX)
    if (number := _like_a_row(raw, fields, form)) is not None:
        line = start + number
        reason = f"{file}, line {start}: a quote opens and closes in line {end}, but line {line} reads like a row"
        raise TableError(reason, f"{_QUOTE_FIX}, or take the line breaks out of its text")


def _like_a_row(raw: list[str], fields: list[str], form: dict[str, Any]) -> int | None:
    """Return the line of a row of several lines that reads like a row, if any, by the columns without line breaks."""
    width = len(fields)
    broken = [column for column, text in enumerate(fields) if {*text} & {*"\r\n"}]
    left = [(column, fields[column]) for column in range(broken[0])]
    right = [(column - width, fields[column]) for column in range(broken[-1] + 1, width)]
    for number, line in enumerate(raw):
        others = next(csv.reader([line], **form | {"quoting": csv.QUOTE_NONE}))
        # The first line has the row's own fields on the left, the last line those on the right: both always fit.
        around = (left if number else []) + (right if number < len(raw) - 1 else [])
        pairs = [(others[column], text) for column, text in around] if len(others) >= width else []
        pairs = [pair for pair in pairs if all(map(str.strip, pair))]
        if pairs and all(_shape(field) == _shape(other) for field, other in pairs):
            return number
    return None


def _shape(field: str) -> str:
    """Return the kind of a field: a number, the name of a file of some type, or other text."""
    try:
        return str(type(float(field)))
    except ValueError:
        return splitext(field.strip())[1].lower()  # noqa: PTH122 (of any text)


def _json_lines(file: str, needed: Sequence[str]) -> Iterator[Line]:
    with _text(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file}, line {number}"
                values = _parsed(place, line)
                names = _columns(place, list(values), needed, "give every row these keys")
                fault = "has a NUL or half a character in it" if "\\u" in line and not _is_text(values) else None
                yield Line(number, dict(zip(names, values.values(), strict=True)), fault)


def _is_text(values: dict[str, Any]) -> bool:
    """Whether all values are text that a file name can have: escapes of JSON can write NUL and half characters."""
    try:
        return b"\0" not in "".join(map(str, values.values())).encode()
    except UnicodeEncodeError:
        return False


def _parsed(place: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=lambda pairs: _once(place, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"{place} is not a JSON object ({error})", "correct the list") from error
    if not isinstance(values, dict):
        raise TableError(f"{place} is not a JSON object but a {type(values).__name__}", "correct the list")
    return values


def _once(place: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise TableError(f"{place} gives a key twice: {[key for key, _ in pairs]}", "keep one of them")
    return values


def _parquet(file: str, needed: Sequence[str]) -> Iterator[Line]:
    with table.open_parquet(file) as data:
        parquet = pq.ParquetFile(data)
        names = _columns(file, parquet.schema_arrow.names, needed, "rename or add them")
        number = 0
        for batch in parquet.iter_batches(batch_size=2_000):
            columns = [column.to_pylist() for column in batch.columns]
            for values in zip(*(map(_decoded, column) for column in columns), strict=True):
                number += 1
                yield Line(number, dict(zip(names, values, strict=True)))


def _decoded(value: Any) -> Any:
    """Return a value; bytes become text if they are UTF-8, since some writers store texts as bytes."""
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _columns(place: str, found: Sequence[str], needed: Sequence[str], fix: str) -> list[str]:
    """Return the columns' names in lower case; raises `TableError` for duplicate names and missing needed ones."""
    names = [name.strip().lower() for name in found]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise TableError(f"{place}: columns {twice} occur twice in {list(found)}", "rename or delete one of each")
    if absent := [name for name in needed if not {*name.split("/")} & {*names}]:
        absent = [name.replace("/", " or ") for name in absent]
        raise TableError(f"{place}: columns {absent} are missing; it has {list(found)}", fix)
    return names


@contextmanager
def _text(file: str) -> Iterator[Iterator[str]]:
    """Yield the lines of a text with their ends: LF, CR LF or CR."""
    with storage.opened(file) as data:
        is_utf16 = data.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8-sig", "surrogateescape")
    # Opened twice: a web server without ranges cannot seek back.
    with storage.opened(file) as data, TextIOWrapper(data, encoding, errors, newline="") as text:
        yield _checked(file, text)


def _checked(file: str, text: Iterable[str]) -> Iterator[str]:
    fix = "save the list as UTF-8 (`iconv -f WINDOWS-1252 -t UTF-8` converts one of Western Windows)"
    for number, line in enumerate(text, 1):
        if not line.isascii() and (escaped := next((c for c in line if "\udc80" <= c <= "\udcff"), None)):
            raise TableError(f"{file}, line {number}: byte 0x{ord(escaped) - 0xDC00:02x} is not UTF-8", fix)
        if "\0" in line:
            reason = f"{file}, line {number}: a NUL character; the file is damaged, or not in UTF-8"
            raise TableError(reason, "save the list as UTF-8 (`iconv -f UTF-16 -t UTF-8` converts UTF-16)")
        yield line
