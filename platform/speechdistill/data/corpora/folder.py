"""A folder of audio files, local or behind an fsspec URL: nothing is known but where the files are."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from speechdistill.io import places, storage
from speechdistill.io.errors import UserError
from speechdistill.io.places import Seen, Skipped


def rows(root: str, kind: str, skipped: Skipped, seen: Seen | None = None) -> Iterator[dict[str, Any]]:
    """A row per audio file below `root`, as `places.below` walks; roots with one `seen` give each file once.

    Raises `UserError` if there is no such folder.
    """
    corpus = PurePosixPath(root.rstrip("/")).name
    try:
        for uri in places.below(storage.absolute(root), places.is_audio, skipped, seen):
            yield {"uri": uri, "kind": kind, "corpus": corpus}
    except NotADirectoryError:
        raise UserError(f"{root} is not a folder", "give folders with --speech, --noise, --rir") from None


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
