"""Rules for the rows of lists, corpora, manifests and tars: spellings of scores, votes and splits, and several rows of
one clip.

- An empty score or NaN is no score: the clip stays, without a score. Anything else but a number from 1 to 5 is a fault.
- Splits are train, validation and test; `SPLIT_NAMES` has their other spellings. Another name is a fault.
- Several rows of one clip become its mean score, weighted by votes (1 for a row without votes), and the sum of votes.
  Other columns that disagree are a fault.

A row with a fault has `error`, an `AudioError` that names the clip, the list and the line. `ingest` rejects its clip;
commands that train or compare refuse the list.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from posixpath import normpath
from typing import Any

import numpy as np

from speechdistill.data.clips import clip_id
from speechdistill.io.errors import AudioError, TableError

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
PLACE = "listed in"
"""Key of a row for its list and line, which messages name. `merged` removes it."""

_EMPTY = {"", "nan", "na", "n/a", "null", "none", "<na>"}
_FIX = "correct the list"
_HELD_ROWS = 100_000
_KINDS = ("speech", "noise", "rir")
Row = dict[str, Any]
"""A row of a manifest that is being made: columns of `clip.v1`, first of all `uri` and `kind`.

A row with `error`, an exception, is rejected with it. `known` is the stored row of a clip that the manifest already
has.
"""


def is_empty(value: Any) -> bool:
    """Return whether a value is null, blank text, or NaN, which other tools write for both."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or bool(value != value)


def split_name(value: Any) -> str | None:
    """Return the split for a name, None for an empty one; raises `TableError` for an unknown name."""
    if is_empty(value):
        return None
    if (name := SPLIT_NAMES.get(str(value).strip().lower())) is None:
        raise TableError(f"split {str(value)!r} is unknown", f"choose from {', '.join(SPLITS)}")
    return name


def score(value: Any) -> float | None:
    """Parse a mean opinion score, also with a decimal comma; raises `TableError` unless it is from 1 to 5."""
    number = _number(value)
    if number is None:
        return None
    if not 1 <= number <= 5:  # also true for NaN
        raise TableError(f"mos {value!r:.60} is not a number from 1 to 5", _FIX)
    return number


def described(uri: str, place: str, columns: Row, fault: str | None = None) -> Row:
    """Return the normalised row of the clip at `uri`; `kind` defaults to speech.

    A row with a `fault` has `error`, which names `place`, the list and the line.
    """
    row = {"kind": "speech", **columns, "uri": uri, PLACE: place}
    try:
        if fault:
            raise TableError(f"its row {fault}", _FIX)
        return normalised(row)
    except TableError as error:
        return {**row, "error": AudioError(uri, f"{error.reason} ({place})", error.fix)}


def summary(counts: Counter[str]) -> str:
    """Return a line for the counts of `merged`.

    Such as `9 rows = 6 files (5 with a score) + 2 further rows of the same files + 1 rejected`.
    """
    scored = f" ({counts['scored']:,} with a score)" if counts["scored"] else ""
    parts = [f"{counts['rows']:,} rows = {counts['files']:,} files{scored}"]
    left = {"further rows of the same files": counts["further"], "rejected": counts["rejected"]}
    return " + ".join([*parts, *(f"{count:,} {what}" for what, count in left.items() if count)])


def normalised(row: Row) -> Row:
    """Return a row with `mos`, `votes`, `split` and `kind` as stored; raises `TableError` for an invalid value."""
    row = dict(row)
    for key, rule in _RULES:
        if key in row:
            row[key] = rule(row[key])
    return row


def merged(read: Callable[[], Iterable[Row]], counts: Counter[str] | None = None) -> Iterator[Row]:
    """Yield one row for each clip of the rows that `read()` returns; clips with several rows come last.

    All rows are read first, so that an unreadable list raises before the work. At most 100,000 rows are kept in memory,
    so a longer list is read twice. `counts` gets the numbers of `rows`, `files`, `scored` files, `further` rows of a
    file, and `rejected` rows.
    """
    rows = iter(read())
    held = list(islice(rows, _HELD_ROWS))
    ids = np.fromiter((int(_identity(row), 16) for row in chain(held, rows)), np.uint64)
    distinct, occurrences = np.unique(ids, return_counts=True)
    repeated = {f"{identity:016x}" for identity in distinct[occurrences > 1].tolist()}
    counts = Counter() if counts is None else counts
    counts["rows"] += len(ids)
    return _merged(held if len(held) == len(ids) else _same(read(), ids), repeated, counts)


def _same(rows: Iterable[Row], ids: np.ndarray) -> Iterator[Row]:
    """Read the rows again; raises `TableError` if they are not those of the first time."""
    number = 0
    for number, row in enumerate(rows, 1):
        if number > len(ids) or int(_identity(row), 16) != ids[number - 1]:
            break
        yield row
    else:
        if number == len(ids):
            return
    raise TableError(f"a list changed while it was read, at row {number:,} of {len(ids):,}", "rerun the command")


def _merged(rows: Iterable[Row], repeated: set[str], counts: Counter[str]) -> Iterator[Row]:
    several: dict[str, list[Row]] = {}
    for row in rows:
        if repeated and (identity := _identity(row)) in repeated:
            several.setdefault(identity, []).append(row)
        else:
            yield _counted(row, counts)
    for group in several.values():
        counts["further"] += len(group) - 1
        yield _counted(_one(group), counts)


def _counted(row: Row, counts: Counter[str]) -> Row:
    counts["rejected" if "error" in row else "files"] += 1
    counts["scored"] += "error" not in row and row.get("mos") is not None
    row.pop(PLACE, None)
    return row


def _one(rows: list[Row]) -> Row:
    """Merge the rows of one clip."""
    if fault := next((row for row in rows if "error" in row), None):
        return fault
    known: Row = {"uri": rows[0]["uri"]}
    for row in rows:
        for key in row.keys() - {"uri", "mos", "votes", PLACE}:
            if row[key] is not None and known.setdefault(key, row[key]) != row[key]:
                return {**rows[0], "error": _disagreement(rows, key)}
    scored = [(row["mos"], row.get("votes") or 1) for row in rows if row.get("mos") is not None]
    if scored:
        known["votes"] = sum(votes for _, votes in scored)
        known["mos"] = math.fsum(mos * votes for mos, votes in scored) / known["votes"]
    return known


def _disagreement(rows: list[Row], key: str) -> AudioError:
    filled = [row for row in rows if row.get(key) is not None]
    first, other = filled[0], next(row for row in filled if row[key] != filled[0][key])
    places = " and ".join(f"{row[key]!r} ({row.get(PLACE, 'its list')})" for row in (first, other))
    return AudioError(first["uri"], f"its rows disagree: {key} is {places}", "keep one of them")


def _identity(row: Row) -> str:
    uri = row["uri"]  # may be one of several spellings of a local path
    return clip_id(str(row["kind"]), uri if "://" in uri else normpath(uri))


def _number(value: Any) -> float | None:
    """Return None for an empty value, NaN for an invalid number."""
    if is_empty(value):
        return None
    if isinstance(value, str):
        if value.strip().lower() in _EMPTY:
            return None
        value = value.replace(",", ".") if "." not in value else value  # `4,5` is 4.5
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan


def _kind(value: Any) -> str:
    kind = str(value).strip().lower()
    if kind not in _KINDS:
        raise TableError(f"kind {value!r:.60} is unknown", f"choose from {', '.join(_KINDS)}")
    return kind


def _votes(value: Any) -> int | None:
    number = _number(value)
    if number is None:
        return None
    if not 0 <= number < 2**31 or number != int(number):
        raise TableError(f"votes {value!r:.60} is not a count", _FIX)
    return int(number)


_RULES: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("mos", score),
    ("votes", _votes),
    ("split", split_name),
    ("kind", _kind),
)
