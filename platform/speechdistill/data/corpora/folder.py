"""A folder of audio files, local or behind an fsspec URL: nothing is known but where the files are."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from speechdistill.io import storage
from speechdistill.io.audio import EXTENSIONS
from speechdistill.io.errors import UserError

_FIX = "give folders with --speech, --noise, --rir"


def rows(root: str, kind: str, ignored: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row per audio file below `root`, in sorted order, links followed; `ignored` counts what else is there.

    Raises `UserError` if there is no such folder.
    """
    corpus = PurePosixPath(root.rstrip("/")).name
    for uri in _files(root, ignored):
        extension = os.path.splitext(uri)[1].lower()  # noqa: PTH122 (a URL is no path)
        if extension in EXTENSIONS:
            yield {"uri": uri, "kind": kind, "corpus": corpus}
        else:
            ignored[extension or "(none)"] += 1


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


def _files(root: str, ignored: Counter[str]) -> Iterator[str]:
    if "://" in root:
        yield from _files_of_url(root)
        return
    if not Path(root).is_dir():
        raise UserError(f"{root} is not a folder", _FIX)
    seen: set[tuple[int, int]] = set()  # followed links may lead back

    def unreadable(error: OSError) -> None:
        ignored["(unreadable folder)"] += 1

    for folder, folders, names in os.walk(Path(root).resolve(), onerror=unreadable, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (f"{folder}/{name}" for name in sorted(names))


def _files_of_url(root: str) -> Iterator[str]:
    fs, path = storage.file_system(root)
    with storage.access(root):
        is_folder = fs.isdir(path)
    if not is_folder:
        raise UserError(f"{root} is not a folder", _FIX)
    archive = root[root.index("::") :] if "::" in root else ""  # zip://folder::s3://bucket/a.zip
    with storage.access(root):
        for folder, _, names in fs.walk(path, on_error="raise"):  # else what cannot be listed is left out
            for name in sorted(names):
                yield fs.unstrip_protocol(f"{folder}/{name}") + archive
