"""Rules for the row of a list: the score, the votes and the split, however they are written, and several
rows of one clip. The rules are the same for lists, corpora, manifests and tars.

- A score that is empty or NaN is none: the clip stays, without a score. One that is no number from 1 to 5 is a fault.
- Splits are train, validation and test; `SPLIT_NAMES` has their other spellings. Another name is a fault.
- Several rows of one clip are its mean score, weighted by votes (a row without votes is one), and the sum of the votes.
  Other columns that disagree are a fault.

A row with a fault has `error`, an `AudioError` that names the clip, the list and the line. `ingest` rejects its clip;
commands that train or judge refuse the list.
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
"""The key of a row under which the list and the line are, for messages; `merged` takes it away."""

_EMPTY = {"", "nan", "na", "n/a", "null", "none", "<na>"}
_FIX = "correct the list"
_HELD_ROWS = 100_000
_KINDS = ("speech", "noise", "rir")
Row = dict[str, Any]


def is_empty(value: Any) -> bool:
    """Whether a value of any column is none: null, blank text, or the NaN that other tools write for both."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or bool(value != value)


def split_name(value: Any) -> str | None:
    """The split that a name means; raises `TableError` for a name that means none."""
    if is_empty(value):
        return None
    if (name := SPLIT_NAMES.get(str(value).strip().lower())) is None:
        raise TableError(f"split {str(value)!r} is unknown", f"choose from {', '.join(SPLITS)}")
    return name


def score(value: Any) -> float | None:
    """A mean opinion score, also with a decimal comma; raises `TableError` unless it is a number from 1 to 5."""
    number = _number(value)
    if number is None:
        return None
    if not 1 <= number <= 5:  # nor is what is no number
        raise TableError(f"mos {value!r:.60} is not a number from 1 to 5", _FIX)
    return number


def described(uri: str, place: str, columns: Row, fault: str | None = None) -> Row:
    """The row of the clip at `uri`, of kind speech unless `columns` say another, normalised; or with `error`, which
    names `place`, the list and the line."""
    row = {"kind": "speech", **columns, "uri": uri, PLACE: place}
    try:
        if fault:
            raise TableError(f"its row {fault}", _FIX)
        return normalised(row)
    except TableError as error:
        return {**row, "error": AudioError(uri, f"{error.reason} ({place})", error.fix)}


def summary(told: Counter[str]) -> str:
    """`9 rows = 6 files (5 with a score) + 2 further rows of the same files + 1 rejected`, by what `merged` counted."""
    scored = f" ({told['scored']:,} with a score)" if told["scored"] else ""
    parts = [f"{told['rows']:,} rows = {told['files']:,} files{scored}"]
    left = {"further rows of the same files": told["further"], "rejected": told["rejected"]}
    return " + ".join([*parts, *(f"{count:,} {what}" for what, count in left.items() if count)])


def normalised(row: Row) -> Row:
    """A row with `mos`, `votes`, `split` and `kind` as they are stored; raises `TableError` for one of another form."""
    row = dict(row)
    for key, rule in _RULES:
        if key in row:
            row[key] = rule(row[key])
    return row


def merged(read: Callable[[], Iterable[Row]], told: Counter[str] | None = None) -> Iterator[Row]:
    """One row for each clip of the rows that `read()` gives; several rows of a clip come last, as one.

    All are read at once, so that a list that cannot be read is known before the work; many of them a second time later,
    since memory holds 100,000 and eight bytes of each. `told` counts rows, files, scored ones, further rows of a file,
    and rejected ones.
    """
    rows = iter(read())
    held = list(islice(rows, _HELD_ROWS))
    ids = np.fromiter((int(_identity(row), 16) for row in chain(held, rows)), np.uint64)
    found, counts = np.unique(ids, return_counts=True)
    repeated = {f"{identity:016x}" for identity in found[counts > 1].tolist()}
    told = Counter() if told is None else told
    told["rows"] += len(ids)
    return _merged(held if len(held) == len(ids) else _same(read(), ids), repeated, told)


def _same(rows: Iterable[Row], ids: np.ndarray) -> Iterator[Row]:
    """The rows as they are read again; raises `TableError` if they are not those of the first time."""
    number = 0
    for number, row in enumerate(rows, 1):
        if number > len(ids) or int(_identity(row), 16) != ids[number - 1]:
            break
        yield row
    else:
        if number == len(ids):
            return
    raise TableError(f"a list changed while it was read, at row {number:,} of {len(ids):,}", "rerun the command")


def _merged(rows: Iterable[Row], repeated: set[str], told: Counter[str]) -> Iterator[Row]:
    several: dict[str, list[Row]] = {}
    for row in rows:
        if repeated and (identity := _identity(row)) in repeated:
            several.setdefault(identity, []).append(row)
        else:
            yield _counted(row, told)
    for group in several.values():
        told["further"] += len(group) - 1
        yield _counted(_one(group), told)


def _counted(row: Row, told: Counter[str]) -> Row:
    told["rejected" if "error" in row else "files"] += 1
    told["scored"] += "error" not in row and row.get("mos") is not None
    row.pop(PLACE, None)
    return row


def _one(rows: list[Row]) -> Row:
    """Several rows of one clip as one."""
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
    said = [row for row in rows if row.get(key) is not None]
    first, other = said[0], next(row for row in said if row[key] != said[0][key])
    places = " and ".join(f"{row[key]!r} ({row.get(PLACE, 'its list')})" for row in (first, other))
    return AudioError(first["uri"], f"its rows disagree: {key} is {places}", "keep one of them")


def _identity(row: Row) -> str:
    uri = row["uri"]  # a list may write a local path in several ways; what it is stored as stays
    return clip_id(str(row["kind"]), uri if "://" in uri else normpath(uri))


def _number(value: Any) -> float | None:
    """None for what is empty, NaN for what is no number."""
    if is_empty(value):
        return None
    if isinstance(value, str):
        if value.strip().lower() in _EMPTY:
            return None
        value = value.replace(",", ".") if "." not in value else value  # `4,5`: the comma of half of Europe
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
