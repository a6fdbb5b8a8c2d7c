"""A folder of audio files, local or behind an fsspec URL: nothing is known but where the files are."""

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
