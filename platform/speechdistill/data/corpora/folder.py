"""A folder of audio files, local or behind an fsspec URL: nothing is known but where the files are."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from speechdistill.io import places, storage
from speechdistill.io.errors import UserError
from speechdistill.io.places import Seen, Skipped


def rows(root: str, kind: str, skipped: Skipped, seen: Seen | None = None) -> Iterator[dict[str, Any]]:
    """A row per audio file below `root`, as `places.below` walks; roots with one `seen` give each file once.

    Raises `UserError` if there is no such folder.
    """
    corpus = _name(root)
    try:
        for uri in places.below(storage.absolute(root), places.is_audio, skipped, seen):
            yield {"uri": uri, "kind": kind, "corpus": corpus}
    except NotADirectoryError:
        raise UserError(f"{root} is not a folder", "give folders with --speech, --noise, --rir") from None


def names(roots: Iterable[str]) -> dict[str, str]:
    """The name of each folder, by its absolute address: the corpus of its files."""
    return {storage.absolute(root): _name(root) for root in roots}


def known(row: dict[str, Any], roots: Mapping[str, str], rule: str | None) -> dict[str, Any]:
    """The row of a list, with what the first of the `roots` (`names`) that holds its file says of it where the list is
    silent: the folder's name, and of speech the speaker by `rule`.
    """
    root = next((root for root in roots if row["uri"].startswith(f"{root.rstrip('/')}/")), None)
    if root is None:
        return row
    said = {"corpus": roots[root], "speaker": speaker(row["uri"], rule) if row["kind"] == "speech" else None}
    return row | {key: value for key, value in said.items() if value is not None and row.get(key) is None}


def speaker(uri: str, rule: str | None) -> str | None:
    """Who speaks in a file: by the `rule` "parent" its folder's name, else the group or whole match of a regular
    expression. None if that does not match, or without a rule. Raises `UserError` for an expression that is none.
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
    """The last part of an address as it was given, unless that is `.` or `..`."""
    given = PurePosixPath(root.rstrip("/")).name
    return given if given not in ("", "..") else PurePosixPath(storage.absolute(root)).name
