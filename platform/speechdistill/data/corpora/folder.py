"""A folder of audio files, local or an fsspec URL, without further information about them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from speechdistill.data.listed import Row
from speechdistill.io import places, storage
from speechdistill.io.errors import UserError
from speechdistill.io.places import Seen, Skipped


def rows(root: str, kind: str, skipped: Skipped, seen: Seen | None = None) -> Iterator[Row]:
    """Yield a row per audio file below `root`, in the order of `places.below`; a shared `seen` avoids duplicates.

    Raises `UserError` if there is no such folder.
    """
    corpus = _name(root)
    try:
        for uri in places.below(storage.absolute(root), places.is_audio, skipped, seen):
            yield {"uri": uri, "kind": kind, "corpus": corpus}
    except NotADirectoryError:
        raise UserError(f"{root} is not a folder", "give folders with --speech, --noise, --rir") from None


def names(roots: Iterable[str]) -> dict[str, str]:
    """Return the name of each folder, which is the corpus of its files, by absolute address."""
    return {storage.absolute(root): _name(root) for root in roots}


def known(row: Row, roots: Mapping[str, str], rule: str | None) -> Row:
    """Fill in the row of a list from the first of the `roots` (as `names` returns) that contains its file.

    If the list has no `corpus`, it is the folder's name; if it has no `speaker` of speech, `rule` gives one.
    """
    root = next((root for root in roots if row["uri"].startswith(f"{root.rstrip('/')}/")), None)
    if root is None:
        return row
    defaults = {"corpus": roots[root], "speaker": speaker(row["uri"], rule) if row["kind"] == "speech" else None}
    return row | {key: value for key, value in defaults.items() if value is not None and row.get(key) is None}


def speaker(uri: str, rule: str | None) -> str | None:
    """Return the speaker of a file by `rule`: "parent" for the name of its folder, else a regular expression.

    The speaker is the first group or the whole match; None without a match or a rule. Raises `UserError` for an invalid
    expression.
    """
    if rule is None:
        return None
    if rule == "parent":
        return PurePosixPath(uri).parent.name or None
    try:
        match = re.search(rule, uri)
    except re.error as error:
        reason = f"--speaker-from {rule!r} is neither parent nor a regular expression ({error})"
        raise UserError(reason, "give parent, or an expression such as '/(p[0-9]+)_'") from None
    return ((match[1] if match.re.groups else match[0]) or None) if match else None


def _name(root: str) -> str:
    """Return the last part of an address as given, unless that is `.` or `..`."""
    given = PurePosixPath(root.rstrip("/")).name
    return given if given not in ("", "..") else PurePosixPath(storage.absolute(root)).name
