"""Contract of corpora, one file each in `corpora/`, and what their readers share.

`rows(root, ...)` yields manifest rows (`Row`). The ingest job reads the columns of a file's header itself: duration,
rate, channels, size. Corpora that listeners scored have `READERS`: a reader for each dataset, by its command-line name.
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
from speechdistill.data.listed import Row
from speechdistill.io import storage, table, user_table
from speechdistill.io.errors import TableError

_LOG = logging.getLogger(__name__)
_FROM_HEADER = {"clip_id", "duration_s", "sample_rate", "channels", "size_bytes", "etag"}
_NUMBERS = {"mos", "votes"}
_SHOWN = 10  # examples in an error
_THREADS = 32  # requests at a time whether files exist
HeldOut = Literal["both", "either"]


class Reader(NamedTuple):
    """Reader of a scored dataset, and its numbers of clips in Distill-MOS (section III-A, Table I)."""

    rows: Callable[[str], Iterable[Row]]
    """Yields the rows of a folder, a path or URL; `mos` may be text as in the corpus."""
    paper: tuple[int, int, int] | None = None
    """Numbers of clips to train, validate and test on; None if the paper does not use the dataset."""
    challenge: bool = False
    """Whether splits are made by holding out systems and inputs, since the corpus has none."""


@cache
def columns() -> frozenset[str]:
    """Return the columns that a list or a tar may have for a clip."""
    return frozenset(table.schema("clip.v1").names) - _FROM_HEADER - {"uri"}


def given(values: Mapping[str, Any]) -> Row:
    """Return the `values` that are columns and not empty: `mos` and `votes` as they are, the others as text."""
    known = columns()
    return {
        key: value if key in _NUMBERS else _text(value)
        for key, value in values.items()
        if key in known and not listed.is_empty(value)
    }


def _text(value: Any) -> str:
    """Return a label as text; 17.0 as `17`, since pandas writes floats if another label of the column is missing."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def read(file: str, needed: Sequence[str], names: Sequence[str] | None = None) -> Iterator[user_table.Line]:
    """Yield the rows of a table in a corpus' folder (`user_table.rows`); raises `TableError` if it is missing."""
    try:
        yield from user_table.rows(file, needed, names)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TableError(f"{file} is missing", "give the folder of the unpacked corpus with --root") from error


def lines(file: str, needed: Sequence[str], header: bool = True) -> list[dict[str, str]]:
    """Read the lines of a CSV that has at least the columns `needed`; without a `header` exactly these.

    Names of columns are in lower case. Raises `TableError` if the file or a column is missing, and for lines that are
    too short or too long.
    """
    read_lines = list(read(file, needed, None if header else needed))
    if wrong := [f"line {line.number} {line.fault}" for line in read_lines if line.fault]:
        raise TableError(f"{file}: {some(wrong, 'rows do not fit')}", "complete or delete these rows")
    return [line.values for line in read_lines]


def path_of(file: str, line: user_table.Line, *names: str) -> str:
    """Remove and return the path of a row, from the first column of `names` that is not empty.

    Raises `TableError` if all are empty.
    """
    for name in names:
        if not listed.is_empty(path := line.values.pop(name, None)):
            if isinstance(path, bytes):
                raise TableError(f"{file}, row {line.number}: {name} {path!r:.60} is not UTF-8", "rename the file")
            return str(path)
    raise TableError(f"{file}, line {line.number} has no path", f"fill in {' or '.join(names)}, or delete the row")


def described(file: str, line: user_table.Line, uri: str, values: Mapping[str, Any]) -> Row:
    """Return the row of the clip at `uri` with the known `values` of a line; `kind` defaults to speech."""
    columns_given, fault = given(values), line.fault
    if wrong := [key for key in columns_given if isinstance(values[key], bytes)]:
        fault = fault or f"has a {wrong[0]} that is not UTF-8"
    return listed.described(uri, f"{file}, line {line.number}", columns_given, fault)


def under(root: str, path: str) -> str:
    """Return the address of a path in a corpus, which may be relative to its folder and have backslashes."""
    path = path.strip().replace("\\", "/")
    return storage.one_name(path if "://" in path or path.startswith("/") else f"{root}/{posixpath.normpath(path)}")


def exist(uris: Sequence[str]) -> list[bool]:
    """Return for each file whether it exists; raises `StorageError` if a storage does not answer."""

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


def some(items: Sequence[str], what: str) -> str:
    """Return such as `3 files are missing (a, b, c)`, or "" for no items."""
    more = ", ..." if len(items) > _SHOWN else ""
    return f"{len(items):,} {what} ({', '.join(items[:_SHOWN])}{more})" if items else ""


def checked(name: str, reader: Reader, root: str, held_out: HeldOut = "both") -> list[Row]:
    """Return the checked rows of a scored dataset below `root`, with splits and with `mos` as numbers.

    Rows of one file are merged (`data/listed.py`). Clips without a score, and counts that differ from the paper's, are
    reported by warnings. Raises `TableError` with counts and ten examples for missing files, scores that are not from 1
    to 5, unknown splits, and rows of one file that disagree.
    """
    counts: Counter[str] = Counter()
    described_rows = [_row(name, root, row) for row in reader.rows(storage.absolute(root))]
    rows = list(listed.merged(lambda: described_rows, counts))
    uris = [row["uri"] for row in rows]
    problems = [
        some([uri for uri, there in zip(uris, exist(uris), strict=True) if not there], "files are missing"),
        some([f"{row['uri']}: {row['error'].reason}" for row in rows if "error" in row], "rows cannot be used"),
        some(
            [row["uri"] for row in rows if reader.challenge and not (row.get("system") and row.get("input_id"))],
            "clips have no system_id or input_id",
        ),
        "" if any(row.get("mos") is not None for row in rows) else "no clip has a score",
    ]
    if any(problems):
        reason = f"{name} in {root}: {'; '.join(filter(None, problems))}"
        raise TableError(reason, "give the folder of the whole corpus, or correct its lists")
    level = logging.WARNING if counts["scored"] < counts["rows"] else logging.INFO
    _LOG.log(level, "%s in %s: %s", name, root, listed.summary(counts))
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
    """Return rows with `split`, made by holding out 1/4 of the systems and 1/4 of the inputs, chosen by hashes.

    Rows train if neither is held out, and validate if both are, or if either is with `held_out="either"`. The paper
    (section III-A) does not specify which; its ratio of 9 : 1 suggests `both`, which leaves out the mixed rows.
    """
    systems = _quarter(name, [row["system"] for row in rows])
    inputs = _quarter(name, [row["input_id"] for row in rows])
    aside = [(row["system"] in systems) + (row["input_id"] in inputs) for row in rows]
    counts = Counter(aside)
    _LOG.info(
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
    """Return rows with `split`: `num_clips` validate (a tenth of a small corpus), chosen by hashes of file names."""
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
    of_split = Counter(row.get("split", "train") for row in rows)
    counts = tuple(of_split[split] for split in listed.SPLITS)
    if paper and counts != paper:
        _LOG.warning(
            "%s has %d, %d and %d clips to train, validate and test on; the paper has %d, %d and %d",
            name,
            *counts,
            *paper,
        )
