"""Corpora: one file each. `rows(root, ...)` yields manifest rows: dictionaries of `clip.v1` columns that start from
`uri` and `kind`; what the file's header says (duration, rate, channels, size) the ingest job reads itself. A row with
`error`, an exception, is rejected with it.

Corpora that listeners scored give `READERS`: a reader for each of their datasets, by its name on the command line.
"""

import hashlib
import logging
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from speechdistill.data import listed
from speechdistill.io import storage, table, user_table
from speechdistill.io.errors import TableError

_LOG = logging.getLogger(__name__)
_FROM_HEADER = {"clip_id", "duration_s", "sample_rate", "channels", "size_bytes", "etag"}
_NUMBERS = {"mos", "votes"}
_SHOWN = 10  # of everything that is wrong
_THREADS = 32  # to ask a storage whether files exist
Row = dict[str, Any]
HeldOut = Literal["both", "either"]


class Reader(NamedTuple):
    """How a scored dataset is read, and how many clips of it Distill-MOS (section III-A, Table I) had in each split."""

    rows: Callable[[str], Iterable[Row]]
    """Rows of what lies in a folder, a path or URL; `mos` may be the text that the corpus gives."""
    paper: tuple[int, int, int] | None = None
    """Clips to train, validate and test on; none where the paper has no such dataset."""
    challenge: bool = False
    """The reader names no splits: those with systems and inputs set aside are made of its rows."""


@cache
def columns() -> frozenset[str]:
    """What a list or a tar may say of a clip."""
    return frozenset(table.schema("clip.v1").names) - _FROM_HEADER - {"uri"}


def given(values: Mapping[str, Any]) -> Row:
    """The known ones of `values` that are not empty, numbers as they were given and the others as text."""
    known = columns()
    return {
        key: value if key in _NUMBERS else _text(value)
        for key, value in values.items()
        if key in known and not listed.is_empty(value)
    }


def _text(value: Any) -> str:
    """A label as text: speaker 17 also from a list whose writer, pandas, made it 17.0 because another is missing."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def read(file: str, needed: Sequence[str], names: Sequence[str] | None = None) -> Iterator[user_table.Line]:
    """The rows of a table that lies in the folder of a corpus (`user_table.rows`); `TableError` if it is missing."""
    try:
        yield from user_table.rows(file, needed, names)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TableError(f"{file} is missing", "--root names the folder of the corpus as it is unpacked") from error


def lines(file: str, needed: Sequence[str], header: bool = True) -> list[dict[str, str]]:
    """The lines of a CSV with at least the columns `needed`, or of one without a header that has just these.

    Names of columns are in lower case. Raises `TableError` for a file that is missing or lacks a column, and for lines
    that are too short or too long.
    """
    found = list(read(file, needed, None if header else needed))
    if wrong := [f"line {line.number} {line.fault}" for line in found if line.fault]:
        raise TableError(f"{file}: {some(wrong, 'rows do not fit')}", "complete or delete these rows")
    return [line.values for line in found]


def path_of(file: str, line: user_table.Line, *names: str) -> str:
    """The path of a row, in the first of some columns that is not empty, which it loses; `TableError` if none."""
    for name in names:
        if not listed.is_empty(path := line.values.pop(name, None)):
            if isinstance(path, bytes):
                raise TableError(f"{file}, row {line.number}: {name} {path!r:.60} is not UTF-8", "rename the file")
            return str(path)
    raise TableError(f"{file}, line {line.number} has no path", f"fill in {' or '.join(names)}, or delete the row")


def described(file: str, line: user_table.Line, uri: str, values: Mapping[str, Any]) -> Row:
    """The row of the clip at `uri` by the known `values` of a line, of kind speech unless they say another."""
    columns_given, fault = given(values), line.fault
    if wrong := [key for key in columns_given if isinstance(values[key], bytes)]:
        fault = fault or f"has a {wrong[0]} that is not UTF-8"
    return listed.described(uri, f"{file}, line {line.number}", columns_given, fault)


def under(root: str, path: str) -> str:
    """The address of a path that a corpus gives relative to its folder, however it writes it."""
    path = path.strip().replace("\\", "/")
    return storage.one_name(path if "://" in path or path.startswith("/") else f"{root}/{posixpath.normpath(path)}")


def exist(uris: Sequence[str]) -> list[bool]:
    """Which of some files there are; raises `StorageError` where a storage does not say."""

    def there(uri: str) -> bool:
        if "://" not in uri:
            return Path(uri).is_file()
        fs, path = storage.file_system(uri)
        with storage.access(uri):
            try:
                return bool(fs.info(path)["type"] == "file")
            except FileNotFoundError:
                return False

    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(there, uris))


def some(found: Sequence[str], what: str) -> str:
    """`3 files are missing (a, b, c)`, or nothing."""
    more = ", ..." if len(found) > _SHOWN else ""
    return f"{len(found):,} {what} ({', '.join(found[:_SHOWN])}{more})" if found else ""


def checked(name: str, reader: Reader, root: str, held_out: HeldOut = "both") -> list[Row]:
    """The rows of a scored dataset below `root`, of kind speech, with splits and `mos` as numbers.

    Several rows of one file are one (`data/listed.py`), and clips without a score are counted in a warning. Raises
    `TableError` with counts and the first ten for missing files, scores that are not from 1 to 5, unknown splits, and
    rows of one file that disagree. Other clip counts than the paper's are a warning, too.
    """
    told: Counter[str] = Counter()
    found = [_row(name, root, row) for row in reader.rows(storage.absolute(root))]
    rows = list(listed.merged(lambda: found, told))
    uris = [row["uri"] for row in rows]
    problems = [
        some([uri for uri, there in zip(uris, exist(uris), strict=True) if not there], "files are missing"),
        some([f"{row['uri']}: {row['error'].reason}" for row in rows if "error" in row], "rows cannot be used"),
        some(
            [row["uri"] for row in rows if reader.challenge and not (row.get("system") and row.get("input_id"))],
            "clips have no system_id or input_id",
        ),
        "" if any(row.get("mos") is not None for row in rows) else "it has no clips with a score",
    ]
    if any(problems):
        reason = f"{name} in {root}: {'; '.join(filter(None, problems))}"
        raise TableError(reason, "give the folder of the whole corpus, or correct its lists")
    level = logging.WARNING if told["scored"] < told["rows"] else logging.INFO
    _LOG.log(level, "%s in %s: %s", name, root, listed.summary(told))
    if reader.challenge:
        rows = held_out_rows(name, rows, held_out, reader.paper)
    _compare(name, rows, reader.paper)
    return rows


def _row(name: str, root: str, row: Row) -> Row:
    if "error" in row:
        return {"dataset": name, **row}
    place = row.get(listed.PLACE, f"the lists in {root}")
    return {"dataset": name, **listed.described(row["uri"], place, row)}


def held_out_rows(
    name: str, rows: list[Row], held_out: HeldOut = "both", paper: tuple[int, int, int] | None = None
) -> list[Row]:
    """Rows with `split`, where 1/4 of the systems and 1/4 of the inputs are set aside, in an order by hashes.

    They train where neither is set aside, and validate where both are, or with `held_out="either"` where one is, too.
    The paper (section III-A) does not say which; its 9 : 1 speaks for `both`, which leaves the mixed rows out.
    """
    systems = _quarter(name, [row["system"] for row in rows])
    inputs = _quarter(name, [row["input_id"] for row in rows])
    aside = [(row["system"] in systems) + (row["input_id"] in inputs) for row in rows]
    counts = Counter(aside)
    _LOG.warning(
        "%s: %d of the clips train; %d validate with both the system and the input held out, %d with either%s",
        name,
        counts[0],
        counts[2],
        counts[1] + counts[2],
        f" (the paper: {paper[0]} and {paper[1]})" if paper else "",
    )
    names = {0: "train", 1: "validation" if held_out == "either" else None, 2: "validation"}
    return [{**row, "split": names[n]} for row, n in zip(rows, aside, strict=True) if names[n]]


def with_validation(rows: Iterable[Row], num_clips: int = 1_000) -> list[Row]:
    """Rows whose `split` is validation for `num_clips` of them (a tenth of a small corpus), drawn by file names."""
    rows = list(rows)
    ranked = sorted(rows, key=lambda row: _hash(row["uri"].rsplit("/", 2)[-2:]))
    chosen = {row["uri"] for row in ranked[: min(num_clips, len(rows) // 10)]}
    return [{**row, "split": "validation" if row["uri"] in chosen else "train"} for row in rows]


def _quarter(name: str, values: Sequence[str]) -> set[str]:
    ranked = sorted(set(values), key=lambda value: _hash([name, value]))
    return set(ranked[: max(1, round(len(ranked) / 4))])


def _hash(words: Sequence[str]) -> str:
    return hashlib.sha256("/".join(words).encode()).hexdigest()


def _compare(name: str, rows: Sequence[Row], paper: tuple[int, int, int] | None) -> None:
    counts = Counter(row.get("split", "train") for row in rows)
    found = tuple(counts[split] for split in listed.SPLITS)
    if paper and found != paper:
        _LOG.warning(
            "%s has %d, %d and %d clips to train, validate and test on; the paper has %d, %d and %d",
            name,
            *found,
            *paper,
        )
