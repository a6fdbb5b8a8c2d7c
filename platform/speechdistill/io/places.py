"""Search for files in folders, globs and URLs, by one rule for all commands.

A path that the user gives is always used. Below a folder and in a glob, links are followed, loops end, and each file is
used once: a link is skipped if its target is used under another name (hard links are separate files). Hidden and system
files and folders are skipped unless the glob names them: names that begin with a dot, and those that other systems
leave on disks (`__MACOSX`, `@eaDir`, `Thumbs.db`, ...). Names may contain any other character, and names that differ
only in case are two files. Skipped files are counted and reported.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from speechdistill.io import globs, storage
from speechdistill.io.audio import EXTENSIONS

HIDDEN = "(hidden or system)"
_TAKEN = "(link to a file that is taken already)"
_SYSTEM = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "@recycle", "#recycle", "#snapshot"}
_SYSTEM |= {"$recycle.bin", "system volume information", "lost+found"}
_SHOWN = 3
_LOCAL = re.compile("^(file|local)://")
Wanted = Callable[[str], bool]
"""Whether to search for files of this name."""
_Key = tuple[int, int]


class Skipped(Counter[str]):
    """Count of skipped files by reason (an extension, or a text in brackets); `names` has the first of each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self[reason] += 1
        first = self.names.setdefault(reason, [])
        if len(first) < _SHOWN:
            first.append(name)

    def merge(self, other: "Skipped") -> None:
        self.update(other)
        for reason, names in other.names.items():
            first = self.names.setdefault(reason, [])
            first += names[: _SHOWN - len(first)]

    def lines(self) -> list[str]:
        """Return a line per reason, the most frequent first: `skipped .txt × 2: 'a/b.txt', 'a/c.txt'`."""
        shown = ((reason, count, self.names.get(reason, [])) for reason, count in self.most_common())
        return [
            f"skipped {reason} × {count:,}: {', '.join(map(repr, names))}{', ...' * (count > len(names))}"
            for reason, count, names in shown
        ]


@dataclass
class Seen:
    """Record of one or several walks: folders, each with its place below its root, and targets of links."""

    folders: dict[_Key, tuple[str, ...]] = field(default_factory=dict)
    links: set[tuple[_Key, str]] = field(default_factory=set)


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or left on disks by an operating system."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


def extension(name: str) -> str:
    """Return the last suffix in lower case, without trailing blanks."""
    return PurePosixPath(name).suffix.rstrip().lower()


def is_audio(name: str) -> bool:
    """Whether a search of folders treats a file of this name as audio."""
    return extension(name) in EXTENSIONS


def below(root: str, wanted: Wanted, skipped: Skipped, seen: Seen | None = None) -> Iterator[str]:
    """Yield the files below a folder, a path or URL: those of a folder in order, then those of its folders.

    Raises `NotADirectoryError` if the folder does not exist, and `StorageError` if the storage does not list it.
    """
    root = _LOCAL.sub("", root)
    if "://" in root:
        return _remote(root, wanted, skipped)
    if not Path(root).is_dir():
        raise NotADirectoryError(root)
    return _local(root, wanted, skipped, seen or Seen(), globs.EVERYTHING)


def matches(pattern: str, wanted: Wanted, skipped: Skipped) -> list[str]:
    """Return the files of a path, folder, glob (also `**`) or URL, sorted; an empty list if nothing matches.

    The URL of a file is returned even if the file does not exist; a URL with `*` is a glob. A glob with a suffix
    (`*.raw`) also matches files that are not `wanted`.
    """
    given, pattern = pattern, _LOCAL.sub("", pattern)
    if "://" in pattern:
        return sorted(_of_url(pattern, wanted, skipped))
    if Path(pattern).is_dir():
        return sorted(_local(str(Path(pattern)), wanted, skipped, Seen(), globs.EVERYTHING))
    if os.path.lexists(pattern):  # before globs: a file may be called `take[1].wav`
        return [given]
    if not glob.has_magic(pattern):
        return []
    base, parts = globs.split(pattern)
    if not Path(base).is_dir():
        return []
    return sorted(_local(base, _anything if globs.names_suffix(pattern) else wanted, skipped, Seen(), parts))


def once(paths: Iterator[str] | list[str], known: set[str]) -> Iterator[str]:
    """Yield the paths whose file is not in `known`, a set of real paths and URLs, and add the file there."""
    folders: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        real = path
        if "://" not in path:
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            real = os.path.realpath(path) if os.path.islink(path) else f"{folders[folder]}/{name}"  # noqa: PTH114
        if real not in known:
            known.add(real)
            yield path


def _local(root: str, wanted: Wanted, skipped: Skipped, seen: Seen, parts: tuple[str, ...]) -> Iterator[str]:
    """Yield the files below `root` whose place there fits the parts of a glob. Not recursive: trees may be deep."""
    stack: list[tuple[str, tuple[str, ...]]] = [(root, ())]
    while stack:
        folder, inside = stack.pop()
        try:
            key = _key(os.stat(folder))  # noqa: PTH116
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            skipped.add("(unreadable folder)", folder)
            continue
        if key in seen.folders:
            skipped.add("(folder that is walked already)", folder)
            continue
        seen.folders[key] = inside
        deeper = []
        for entry in entries:
            place, path = (*inside, entry.name), entry.path.removeprefix("./")
            is_folder = _is_folder(entry)
            if not (globs.may_hold if is_folder else globs.fits)(place, parts):
                continue
            if is_system(entry.name) and not globs.is_spelled_out(entry.name, parts):
                skipped.add(HIDDEN, path + "/" * is_folder)
            elif is_folder:
                deeper.append((path, place))
            elif reason := _left_out(entry, key, wanted, seen, parts):
                skipped.add(reason, path)
            else:
                yield path
        stack += reversed(deeper)


def _left_out(entry: os.DirEntry[str], folder: _Key, wanted: Wanted, seen: Seen, parts: tuple[str, ...]) -> str:
    """Return the reason to skip a file, or an empty text."""
    if not wanted(entry.name):
        return extension(entry.name) or "(none)"
    if not entry.is_symlink():
        return _TAKEN if (folder, entry.name) in seen.links else ""
    target = os.path.realpath(entry.path)
    try:
        parent = _key(Path(target).parent.stat())
        Path(target).stat()
    except OSError:
        return ""  # a broken link: the reader reports it for this file
    name = Path(target).name
    place = seen.folders.get(parent)
    is_walked = place is not None and wanted(name) and not is_system(name) and globs.fits((*place, name), parts)
    if is_walked or (parent, name) in seen.links:
        return _TAKEN
    seen.links.add((parent, name))
    return ""


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _anything(name: str) -> bool:
    return True


def _of_url(pattern: str, wanted: Wanted, skipped: Skipped) -> Iterator[str]:
    if "*" not in pattern:  # signed and IPv6 addresses contain "?" and "["
        yield from _remote(pattern, wanted, skipped) if _is_remote_folder(pattern, wanted) else [pattern]
        return
    fs, path = storage.file_system(pattern)
    with storage.access(pattern):
        fs.invalidate_cache()
        files = sorted(fs.glob(path, detail=True).items())
    parts = path.split("/")
    first = next(number for number, part in enumerate(parts) if "*" in part)
    wanted = _anything if globs.names_suffix(path) else wanted
    for name, info in files:
        if info["type"] != "file":
            continue
        hidden = (is_system(part) and not globs.is_spelled_out(part, tuple(parts)) for part in name.split("/")[first:])
        if reason := HIDDEN if any(hidden) else _odd(name, info, wanted):
            skipped.add(reason, fs.unstrip_protocol(name))
        else:
            yield fs.unstrip_protocol(name) + _archive(pattern)


def _is_remote_folder(uri: str, wanted: Wanted) -> bool:
    """Whether a URL names a folder. The storage is asked only if the name leaves that open."""
    if uri.startswith(("http://", "https://")) or wanted(uri.rpartition("/")[2]):
        return False
    if uri.endswith("/"):
        return True
    try:
        fs, path = storage.file_system(uri)
        return bool(fs.isdir(path))
    except Exception:  # of any type; reading the file reports it
        return False


def _remote(root: str, wanted: Wanted, skipped: Skipped) -> Iterator[str]:
    """Yield the files below a URL. (fsspec's walk skips folders that it cannot list, and keys with an empty part.)"""
    fs, path = storage.file_system(root)
    with storage.access(root):
        fs.invalidate_cache()
        is_folder = fs.isdir(path)
    if not is_folder:
        raise NotADirectoryError(root)
    stack = [path]
    while stack:
        folder = stack.pop()
        with storage.access(root):
            files, folders = _listed(fs, folder)
        for name, info in files:
            base = name.rstrip("/").rsplit("/", 1)[-1]
            if reason := HIDDEN if is_system(base) else _odd(name, info, wanted):
                skipped.add(reason, fs.unstrip_protocol(name))
            else:
                yield fs.unstrip_protocol(name) + _archive(root)
        hidden = [name for name in folders if is_system(name.rsplit("/", 1)[-1])]
        for name in hidden:
            skipped.add(HIDDEN, fs.unstrip_protocol(name) + "/")
        stack += sorted(set(folders) - set(hidden), reverse=True)


def _listed(fs: Any, folder: str) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Return files and folders in a folder by name, without markers of folders, which are empty objects."""
    files, folders = [], []
    for info in fs.ls(folder, detail=True):
        name = info["name"].rstrip("/")
        if name != folder.rstrip("/"):
            folders += [name] if info["type"] == "directory" else []
            files += [(info["name"], info)] if info["type"] != "directory" else []
        elif info["type"] == "directory":  # keys whose next part is empty, `folder//x.wav`
            there = fs.find(folder, detail=True)
            fs.invalidate_cache()  # s3fs caches that a folder with only its marker does not exist
            files += [(key, there[key]) for key in there if key.startswith(f"{folder}//")]
        elif info.get("size"):
            files.append((info["name"], info))
    return sorted(files, key=lambda file: file[0]), folders


def _odd(name: str, info: dict[str, Any], wanted: Wanted) -> str:
    """Return the reason to skip a remote file, or an empty text."""
    if name.endswith("/"):
        return "(key that ends in /)"
    if "::" in name:
        return "(key with ::, which no URL can name)"
    base = name.rsplit("/", 1)[-1]
    return "" if wanted(base) else extension(base) or "(none)"


def _archive(uri: str) -> str:
    return uri[uri.index("::") :] if "::" in uri else ""  # zip://*.wav::s3://bucket/a.zip
