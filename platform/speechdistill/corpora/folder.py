"""A folder of audio files, local or behind an fsspec URL: nothing is known but where the files are."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from speechdistill.audio import EXTENSIONS


def rows(root: str, kind: str, ignored: Counter[str]) -> Iterator[dict[str, Any]]:
    """A row per audio file below `root`, in sorted order; `ignored` counts the other files' extensions.

    Raises `FileNotFoundError` where there is no such folder.
    """
    corpus = PurePosixPath(root.rstrip("/")).name
    for uri in _files(root):
        extension = os.path.splitext(uri)[1].lower()  # noqa: PTH122 (a URL is no path)
        if extension in EXTENSIONS:
            yield {"uri": uri, "kind": kind, "corpus": corpus}
        else:
            ignored[extension or "(none)"] += 1


def _files(root: str) -> Iterator[str]:
    if "://" not in root:
        top = Path(root).resolve()
        if not top.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; give folders with --speech, --noise, --rir")
        walk = os.walk(top, followlinks=True)
        prefix = ""
    else:
        fs, path = fsspec.url_to_fs(root)
        if not fs.isdir(path):
            raise FileNotFoundError(f"{root} is not a folder; give folders with --speech, --noise, --rir")
        walk = fs.walk(path)
        prefix = root.split("://")[0] + "://"
    for folder, folders, names in walk:
        if isinstance(folders, list):
            folders.sort()
        for name in sorted(names):
            yield f"{prefix}{folder}/{name}"
