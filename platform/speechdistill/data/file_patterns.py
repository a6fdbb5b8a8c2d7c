"""Files named by paths, URLs, globs and braces, such as `s3://bucket/shard-{000..099}.tar`."""

import glob
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from braceexpand import braceexpand

from speechdistill.io import audio_files, places, storage
from speechdistill.io.errors import TableError
from speechdistill.io.places import Skipped

COMPRESSED = "compressed, so its members cannot be read by byte ranges"
UNPACK = "unpack it (`gunzip`) to a plain .tar"

_THREADS = 16  # a request for each file, mostly waiting
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


def files(patterns: Sequence[str], skipped: Skipped | None = None) -> list[str]:
    """Return the files that paths, URLs, globs and braces (`{000..099}`, `{a,b}`) name: absolute, distinct, in order.

    `skipped` counts what globs leave out. Raises `TableError` naming missing files, compressed tars, and globs without
    a match.
    """
    skipped = Skipped() if skipped is None else skipped
    uris = dict.fromkeys(uri for pattern in patterns for uri in _matches(pattern, skipped))
    if compressed := [uri for uri in uris if is_compressed(uri)]:
        raise TableError(f"{compressed[0]}: {COMPRESSED}", UNPACK)
    return list(uris)


def is_compressed(uri: str) -> bool:
    """Return whether the name is that of a compressed tar."""
    return _COMPRESSED.search(path_of(uri)) is not None


def path_of(uri: str) -> str:
    """Return the part of a URL that ends in the file's own name.

    It is the first one in `zip://a.tar::s3://bucket/x.zip`, and has no query in `https://host/a.tar?key=1`.
    """
    inner = next((part for part in uri.split("::") if "://" in part), uri)
    return inner.split("?")[0] if inner.startswith(("http://", "https://")) else inner


def _matches(pattern: str, skipped: Skipped) -> list[str]:
    pattern = re.sub("^(file|local)://", "", pattern)
    if "://" not in pattern:
        pattern = str(Path(pattern).absolute())  # links are not resolved: their targets may have other suffixes
        if Path(pattern).is_file():  # before globs: a file may be called `take[1].csv`
            return [pattern]
    names = list(dict.fromkeys(_expanded(pattern)))
    with ThreadPoolExecutor(_THREADS) as threads:
        left_out = [Skipped() for _ in names]
        results = list(threads.map(_files_or_problem, names, left_out))
    for part in left_out:
        skipped.merge(part)
    if problems := [result for result in results if isinstance(result, str)]:
        which = f"{len(problems)} of the {len(names)} files of {pattern!r}, such as " if len(names) > 1 else ""
        raise TableError(f"{which}{', '.join(problems[:5])}", "correct --list")
    return [uri for uris in results for uri in uris]


def _expanded(pattern: str) -> list[str]:
    """Expand braces as in a shell, with leading zeros; a pattern with unbalanced braces stays as it is."""
    try:
        return list(braceexpand(pattern, escape=False))
    except ValueError:
        return [pattern]


def _files_or_problem(name: str, skipped: Skipped) -> list[str] | str:
    """Return the files of a path, URL or glob, or a message if there are none."""
    try:
        return _files(name, skipped) or f"{name!r} (no such file)"
    except FileNotFoundError:
        return f"{name!r} (no such file)"
    except Exception as error:  # storage plugins raise their libraries' own types
        return f"{name!r} ({type(error).__name__}: {audio_files.one_line(error)})"


def _files(name: str, skipped: Skipped) -> list[str]:
    if "*" in name or ("://" not in name and glob.has_magic(name)):  # "?" and "[" occur in signed and IPv6 addresses
        return places.matches(name, lambda _: True, skipped)
    if "://" not in name:
        return [name] if Path(name).is_file() else []
    fs, path = storage.file_system(name)
    fs.invalidate_cache()
    return [name] if fs.info(path)["type"] == "file" else []
